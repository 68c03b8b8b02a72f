//! Purchases that cannot be read or make no sense.

use reqwest::{
    Body, Method, RequestBuilder,
    header::{HeaderMap, HeaderValue},
};
use serde_json::json;
use stockade::{auth::Role, clock};

use super::{Unchanged, invalid, refused};
use crate::support::app::{App, id, send};

#[tokio::test]
async fn every_bad_body_of_a_purchase_is_refused_at_its_place() {
    let app = App::start().await;
    let sale = app.sale(json!({})).await;
    let sale = id(&sale);
    let buyer = clock::new_id();
    let unchanged = Unchanged::since_now(&app, sale).await;
    let deep = format!(r#"{{"quantity": {}"#, "[".repeat(9_000));
    let deep_object = r#"{"a": "#.repeat(2_000);
    for (body, status, pointer) in [
        // Out of range.
        (r#"{"quantity": 0}"#, 422, "#/quantity"),
        (r#"{"quantity": -1}"#, 422, "#/quantity"),
        (r#"{"quantity": 1000000000}"#, 422, "#/quantity"),
        (r#"{"quantity": 9223372036854775807}"#, 422, "#/quantity"),
        // Of the wrong type.
        (r#"{"quantity": 9223372036854775808}"#, 400, "#/quantity"),
        (r#"{"quantity": 1e400}"#, 400, "#/quantity"),
        (r#"{"quantity": 1.5}"#, 400, "#/quantity"),
        (r#"{"quantity": "1"}"#, 400, "#/quantity"),
        (r#"{"quantity": null}"#, 400, "#/quantity"),
        (r#"{"quantity": true}"#, 400, "#/quantity"),
        (r#"{"quantity": {}}"#, 400, "#/quantity"),
        (&deep, 400, "#/quantity"),
        // Of the wrong shape.
        ("{}", 400, "#/quantity"),
        (r#"{"quantity": 1, "price": 0}"#, 400, "#/price"),
        (r#"{"quantity": 1, "quantity": 1}"#, 400, "#"),
        (&deep_object, 400, "#/a"),
        ("[]", 400, "#"),
        ("[1]", 400, "#"),
        ("1", 400, "#"),
        ("null", 400, "#"),
        // Not JSON.
        ("", 400, "#"),
        ("{", 400, "#"),
        ("quantity=1", 400, "#"),
        (r#"{"quantity": 1} {}"#, 400, "#"),
        (r#"{"quantity": 1,}"#, 400, "#"),
        (r"{'quantity': 1}", 400, "#"),
    ] {
        let answer = send(app.purchase(sale, buyer, "k", body.to_owned())).await;
        let start: String = body.chars().take(60).collect();
        assert_eq!(answer.status, status, "{start}: {answer:?}");
        invalid(&answer, status, pointer);
        unchanged.holds(&start).await;
    }
    let answer = send(app.purchase(sale, buyer, "k", vec![0xff, 0xfe])).await;
    invalid(&answer, 400, "#");

    let large = json!({"quantity": 1, "note": "x".repeat(20 * 1024)}).to_string();
    let padded = format!(r#"{{"quantity": 1}}{}"#, " ".repeat(20 * 1024));
    let chunks = padded.clone().into_bytes();
    let chunks: Vec<_> = chunks
        .chunks(1000)
        .map(|chunk| Ok::<_, std::io::Error>(chunk.to_vec()))
        .collect();
    let without_length = Body::wrap_stream(futures::stream::iter(chunks));
    for body in [large.into(), padded.into(), without_length] {
        let answer = send(app.purchase(sale, buyer, "k", body)).await;
        refused(&answer, "payload_too_large", "never", json!({}));
    }
    for kind in ["text/plain", "application/x-www-form-urlencoded", "json"] {
        let request = ask(
            &app,
            sale,
            &[("content-type", kind), ("idempotency-key", "k")],
        );
        let answer = send(request.body(r#"{"quantity": 1}"#)).await;
        refused(&answer, "unsupported_media_type", "never", json!({}));
    }
    let undeclared = ask(&app, sale, &[("idempotency-key", "k")]).body(r#"{"quantity": 1}"#);
    refused(
        &send(undeclared).await,
        "unsupported_media_type",
        "never",
        json!({}),
    );
    unchanged.at_the_end().await;
    app.finish().await;
}

/// A purchase of another buyer each time, with these headers.
fn ask(app: &App, sale: &str, headers: &[(&str, &str)]) -> RequestBuilder {
    let token = app.token(clock::new_id(), Role::Buyer);
    let mut request = app
        .request(Method::POST, &format!("/v1/sales/{sale}/orders"))
        .bearer_auth(token);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request
}

#[tokio::test]
async fn a_key_is_visible_ascii_of_a_modest_length() {
    let app = App::start().await;
    let sale = app.sale(json!({"allocation": 10})).await;
    let sale = id(&sale);
    let unchanged = Unchanged::since_now(&app, sale).await;
    let purchase = |keys: &[&[u8]]| {
        let mut headers = HeaderMap::new();
        for key in keys {
            headers.append("idempotency-key", HeaderValue::from_bytes(key).unwrap());
        }
        ask(&app, sale, &[])
            .headers(headers)
            .json(&json!({"quantity": 1}))
    };
    for missing in [&[] as &[&[u8]], &[b""], &[b"   "], &[b"\"\""]] {
        let answer = send(purchase(missing)).await;
        refused(&answer, "idempotency_key_missing", "never", json!({}));
    }
    let long = "k".repeat(300);
    let too_long = "k".repeat(256);
    for bad in [
        &[long.as_bytes()] as &[&[u8]],
        &[too_long.as_bytes()],
        &["schlüssel".as_bytes()],
        &[b"\xff"],
        &[b"two words"],
        &[b"a\tb"],
        &[b"\"open"],
        &[b"\"in\"side\""],
        &[b"one", b"two"],
        &[b"same", b"same"],
    ] {
        let answer = send(purchase(bad)).await;
        invalid(&answer, 400, "#/headers/idempotency-key");
        unchanged.holds("bad key").await;
    }
    unchanged.at_the_end().await;

    let longest = "k".repeat(255);
    for (first, second) in [
        ("k-1", "\"k-1\""),
        ("\"k-2\"", "k-2"),
        (longest.as_str(), &format!("\"{longest}\"")),
        ("!~", "!~"),
    ] {
        let buyer = clock::new_id();
        let sold = app.buy(sale, buyer, first, 1).await.expect(201);
        assert_eq!(sold.header("idempotency-replayed"), None);
        let again = app.buy(sale, buyer, second, 1).await.expect(201);
        assert_eq!(again.header("idempotency-replayed"), Some("true"));
        assert_eq!(again.text, sold.text, "{first} is not {second}");
    }
    // The key is its buyer's own.
    let other = app.buy(sale, clock::new_id(), "k-1", 1).await.expect(201);
    assert_eq!(other.header("idempotency-replayed"), None);
    app.finish().await;
}

#[tokio::test]
async fn what_is_no_id_names_nothing() {
    let app = App::start().await;
    let sale = app.sale(json!({})).await;
    let unchanged = Unchanged::since_now(&app, id(&sale)).await;
    let short = &id(&sale)[1..];
    for bad in [
        "1",
        "{p0}",
        "%7Bp0%7D",
        "{p0}:meta",
        "%00",
        "%ff",
        "%2e%2e%2f",
        "*",
        short,
        "😀",
    ] {
        let sale = format!("/v1/sales/{bad}");
        let order = format!("/v1/orders/{bad}");
        for (method, path) in [
            (Method::POST, format!("{sale}/orders")),
            (Method::POST, format!("{sale}/pause")),
            (Method::POST, format!("{sale}/restock")),
            (Method::POST, format!("{order}/cancel")),
            (Method::GET, format!("{sale}/leaderboard")),
            (Method::GET, format!("{sale}/events")),
            (Method::GET, format!("{sale}/audit")),
            (Method::GET, format!("/v1/products/{bad}")),
            (Method::GET, sale),
            (Method::GET, order),
        ] {
            let request = app
                .operate(method, &path)
                .header("idempotency-key", "k")
                .json(&json!({"quantity": 1}));
            let answer = send(request).await;
            assert_eq!(answer.status, 404, "{path}: {answer:?}");
            refused(&answer, "not_found", "never", json!({}));
        }
    }
    unchanged.at_the_end().await;
    app.finish().await;
}
