//! What operators are refused: sales that make no sense, steps that the state of things does not
//! allow, changes to what has changed meanwhile, and lists that do not exist.

use reqwest::Method;
use serde_json::{Value, json};
use stockade::{auth::Role, clock};
use uuid::Uuid;

use super::{Unchanged, document, invalid, refused};
use crate::support::app::{App, PATIENCE, id, send};

#[tokio::test]
async fn a_sale_that_makes_no_sense_is_not_made() {
    let app = App::start().await;
    let sale = app.sale(json!({})).await;
    let unchanged = Unchanged::since_now(&app, id(&sale)).await;
    let good = json!({
        "product_id": sale["product_id"], "allocation": 5, "per_buyer_limit": 2,
        "opens_at": "2020-01-01T00:00:00Z",
    });
    let price = |amount: Value, currency: &str| json!({"amount": amount, "currency": currency});
    for (member, value, status, pointer) in [
        // Out of range.
        ("allocation", json!(0), 422, "#/allocation"),
        ("allocation", json!(-1), 422, "#/allocation"),
        ("allocation", json!(10_000_001), 422, "#/allocation"),
        ("per_buyer_limit", json!(0), 422, "#/per_buyer_limit"),
        (
            "per_buyer_limit",
            json!(1_000_001),
            422,
            "#/per_buyer_limit",
        ),
        ("per_order_limit", json!(0), 422, "#/per_order_limit"),
        ("per_order_limit", json!(3), 422, "#/per_order_limit"),
        ("name", json!(""), 422, "#/name"),
        ("name", json!("x".repeat(201)), 422, "#/name"),
        ("name", json!("a\u{0}b"), 422, "#/name"),
        ("terms", json!("x".repeat(10_001)), 422, "#/terms"),
        ("price", price(json!(-1), "EUR"), 422, "#/price/amount"),
        ("price", price(json!(1), "eur"), 422, "#/price/currency"),
        ("price", price(json!(1), "EURO"), 422, "#/price/currency"),
        // What an order of 2 costs leaves the bounds of money.
        (
            "price",
            price(json!(100_000_000_000_000_i64), "EUR"),
            422,
            "#/price",
        ),
        (
            "closes_at",
            json!("2020-01-01T00:00:00Z"),
            422,
            "#/closes_at",
        ),
        (
            "closes_at",
            json!("2019-12-31T23:59:59.999Z"),
            422,
            "#/closes_at",
        ),
        ("opens_at", json!("1969-12-31T23:59:59Z"), 422, "#/opens_at"),
        ("product_id", json!(Uuid::from_u128(7)), 422, "#/product_id"),
        ("hold_seconds", json!(0), 422, "#/hold_seconds"),
        ("hold_seconds", json!(86_401), 422, "#/hold_seconds"),
        ("hold_seconds", json!(null), 400, "#/hold_seconds"),
        ("waitlist", json!(true), 422, "#/waitlist"),
        ("limit_scope", json!("shop"), 422, "#/limit_scope"),
        ("ends", json!("never"), 422, "#/ends"),
        ("payment", json!("cash"), 422, "#/payment"),
        ("payment", json!("sandbox"), 422, "#/hold_seconds"),
        // What an order can say, and what a sale can ask for, are not the same words.
        ("durability", json!("fsync"), 422, "#/durability"),
        ("durability", json!("Committed"), 422, "#/durability"),
        // Cannot be read.
        ("allocation", json!(1.5), 400, "#/allocation"),
        ("allocation", json!("5"), 400, "#/allocation"),
        ("allocation", json!(null), 400, "#/allocation"),
        ("allocation", json!(1_u64 << 63), 400, "#/allocation"),
        ("per_buyer_limit", json!([2]), 400, "#/per_buyer_limit"),
        ("per_order_limit", json!(null), 400, "#/per_order_limit"),
        ("name", json!(7), 400, "#/name"),
        ("name", json!(null), 400, "#/name"),
        ("price", json!(1999), 400, "#/price"),
        ("price", price(json!(19.99), "EUR"), 400, "#/price/amount"),
        ("price", json!({"amount": 1}), 400, "#/price/currency"),
        (
            "price",
            json!({"amount": 1, "currency": "EUR", "tax": 1}),
            400,
            "#/price/tax",
        ),
        ("price", json!([1, "EUR"]), 400, "#/price"),
        ("schedule", json!({"every": "day"}), 400, "#/schedule/every"),
        ("schedule", json!(null), 400, "#/schedule"),
        (
            "schedule",
            json!({"cron": "0 18 * * *", "time_zone": "UTC", "duration_seconds": 60}),
            422,
            "#/opens_at",
        ),
        ("opens_at", json!("tomorrow"), 400, "#/opens_at"),
        ("opens_at", json!("2020-01-01"), 400, "#/opens_at"),
        ("opens_at", json!("2020-01-01T00:00:00"), 400, "#/opens_at"),
        ("opens_at", json!(1_577_836_800), 400, "#/opens_at"),
        ("closes_at", json!(null), 400, "#/closes_at"),
        ("product_id", json!("{p0}"), 400, "#/product_id"),
        ("payment", json!(7), 400, "#/payment"),
        ("discount", json!(1), 400, "#/discount"),
        ("id", json!(Uuid::from_u128(7)), 400, "#/id"),
    ] {
        let mut body = good.clone();
        body[member] = value;
        let answer = send(app.operate(Method::POST, "/v1/sales").json(&body)).await;
        assert_eq!(answer.status, status, "{body}: {answer:?}");
        invalid(&answer, status, pointer);
    }
    for member in ["product_id", "allocation", "per_buyer_limit"] {
        let mut body = good.clone();
        body.as_object_mut().unwrap().remove(member);
        let answer = send(app.operate(Method::POST, "/v1/sales").json(&body)).await;
        invalid(&answer, 400, &format!("#/{member}"));
    }
    unchanged.at_the_end().await;

    // One key, one sale.
    let make = |body: &Value| {
        let request = app.operate(Method::POST, "/v1/sales");
        request.header("idempotency-key", "s").json(body)
    };
    let made = send(make(&good)).await.expect(201).json();
    let unchanged = Unchanged::since_now(&app, id(&made)).await;
    let again = send(make(&good)).await.expect(201);
    assert_eq!(again.header("idempotency-replayed"), Some("true"));
    assert_eq!(id(&again.json()), id(&made));
    let mut other = good.clone();
    other["allocation"] = 6.into();
    let answer = send(make(&other)).await;
    refused(&answer, "idempotency_key_mismatch", "never", json!({}));
    unchanged.at_the_end().await;
    app.finish().await;
}

#[tokio::test]
async fn a_restock_that_makes_no_sense_adds_nothing() {
    let app = App::start().await;
    let sale = app.sale(json!({"allocation": 5})).await;
    let path = format!("/v1/sales/{}/restock", id(&sale));
    let restock = |key: Option<&str>, body: &str| {
        let mut request = app
            .operate(Method::POST, &path)
            .header("content-type", "application/json");
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
        }
        send(request.body(body.to_owned()))
    };
    let first = restock(Some("first"), r#"{"units": 3}"#).await.expect(200);
    assert_eq!(first.json()["allocation"], 8);

    let unchanged = Unchanged::since_now(&app, id(&sale)).await;
    for (body, status, pointer) in [
        (r#"{"units": 0}"#, 422, "#/units"),
        (r#"{"units": -1}"#, 422, "#/units"),
        (r#"{"units": 1000000000}"#, 422, "#/units"),
        // One more than the bound leaves room for.
        (r#"{"units": 9999993}"#, 422, "#/units"),
        (r#"{"units": 9223372036854775808}"#, 400, "#/units"),
        (r#"{"units": 1.5}"#, 400, "#/units"),
        (r#"{"units": "1"}"#, 400, "#/units"),
        (r#"{"units": null}"#, 400, "#/units"),
        (r#"{"units": 1, "round": 1}"#, 400, "#/round"),
        ("{}", 400, "#/units"),
        ("", 400, "#"),
    ] {
        let answer = restock(Some("k"), body).await;
        assert_eq!(answer.status, status, "{body}: {answer:?}");
        invalid(&answer, status, pointer);
        unchanged.holds(body).await;
    }
    for missing in [None, Some("")] {
        let answer = restock(missing, r#"{"units": 1}"#).await;
        refused(&answer, "idempotency_key_missing", "never", json!({}));
    }
    let answer = restock(Some("first"), r#"{"units": 4}"#).await;
    refused(&answer, "idempotency_key_mismatch", "never", json!({}));
    let again = restock(Some("first"), r#"{"units": 3}"#).await.expect(200);
    assert_eq!(again.header("idempotency-replayed"), Some("true"));
    unchanged.at_the_end().await;
    app.finish().await;
}

#[tokio::test]
async fn the_state_of_things_refuses_what_contradicts_it() {
    let app = App::start().await;
    let sale = app.sale(json!({})).await;
    let sale_path = format!("/v1/sales/{}", id(&sale));
    let close = app.operate(Method::POST, &format!("{sale_path}/close"));
    send(close).await.expect(200);
    let unchanged = Unchanged::since_now(&app, id(&sale)).await;

    for (action, body) in [
        ("pause", ""),
        ("resume", "{}"),
        ("restock", r#"{"units": 1}"#),
    ] {
        let request = app
            .operate(Method::POST, &format!("{sale_path}/{action}"))
            .header("idempotency-key", "k")
            .header("content-type", "application/json")
            .body(body);
        refused(&send(request).await, "conflict", "never", json!({}));
    }
    // A step has nothing to say but its address.
    for (body, pointer) in [(r#"{"units": 1}"#, "#/units"), ("[]", "#"), ("{", "#")] {
        let request = app
            .operate(Method::POST, &format!("{sale_path}/close"))
            .header("content-type", "application/json")
            .body(body);
        invalid(&send(request).await, 400, pointer);
    }

    let path = format!("/v1/products/{}", sale["product_id"].as_str().unwrap());
    let before = app.get(&path).await.expect(200);
    let version = before.header("etag").unwrap();
    let change = |method: Method, version: Option<&str>| {
        let mut request = app.operate(method.clone(), &path);
        if method == Method::PATCH {
            request = request.json(&json!({"name": "Blue lamp"}));
        }
        send(match version {
            Some(version) => request.header("if-match", version),
            None => request,
        })
    };
    for method in [Method::PATCH, Method::DELETE] {
        let answer = change(method.clone(), None).await;
        refused(&answer, "precondition_required", "never", json!({}));
        for stale in ["\"999\"", "*", "W/\"1\"", "nonsense"] {
            let answer = change(method.clone(), Some(stale)).await;
            refused(&answer, "precondition_failed", "never", json!({}));
        }
    }
    let answer = change(Method::DELETE, Some(version)).await;
    refused(&answer, "conflict", "never", json!({}));
    assert_eq!(app.get(&path).await.expect(200).text, before.text);
    unchanged.at_the_end().await;
    app.finish().await;
}

#[tokio::test]
async fn lists_refuse_what_they_do_not_understand() {
    let app = App::start().await;
    let sale = app.sale(json!({})).await;
    let leaderboard = format!("/v1/sales/{}/leaderboard", id(&sale));
    for list in ["/v1/products", "/v1/sales", "/v1/orders", &leaderboard] {
        for (query, member) in [
            ("limit=0", "limit"),
            ("limit=-1", "limit"),
            ("limit=101", "limit"),
            ("limit=1000000000", "limit"),
            ("limit=9223372036854775808", "limit"),
            ("limit=x", "limit"),
            ("limit=", "limit"),
            ("cursor=x", "cursor"),
            ("cursor=", "cursor"),
            ("cursor=%00", "cursor"),
            ("cursor=eyJhIjoxfQ", "cursor"),
            ("limt=1", "limt"),
        ] {
            let answer = send(app.operate(Method::GET, &format!("{list}?{query}"))).await;
            assert_eq!(answer.status, 400, "{list}?{query}: {answer:?}");
            invalid(&answer, 400, &format!("#/query/{member}"));
        }
        let answer = send(app.operate(Method::GET, &format!("{list}?limit=1&limit=2"))).await;
        assert_eq!(answer.json()["code"], "validation", "{list}: {answer:?}");
        for limit in [1, 100] {
            let path = format!("{list}?limit={limit}");
            let page = send(app.operate(Method::GET, &path)).await.expect(200);
            assert_eq!(
                page.header("content-length"),
                Some(page.text.len().to_string().as_str())
            );
            let page = page.json();
            assert_eq!(
                (&page["has_more"], &page["next_cursor"]),
                (&json!(false), &json!(null))
            );
        }
    }
    for (path, member) in [
        ("/v1/sales?state=gone", "state"),
        ("/v1/orders?status=lost", "status"),
        ("/v1/orders?sale_id=7", "sale_id"),
        ("/v1/orders?buyer_id=%7Bp0%7D", "buyer_id"),
        ("/v1/products?sort=colour", "sort"),
        ("/v1/products?order=up", "order"),
        (&format!("{leaderboard}?round=x"), "round"),
        (&format!("{leaderboard}?round=-1"), "round"),
    ] {
        let answer = send(app.operate(Method::GET, path)).await;
        assert_eq!(answer.status, 400, "{path}: {answer:?}");
        invalid(&answer, 400, &format!("#/query/{member}"));
    }

    // Who asks for the orders of others gets none of them.
    let (ada, bob) = (clock::new_id(), clock::new_id());
    app.buy(id(&sale), ada, "k", 1).await.expect(201);
    app.audit(id(&sale)).await;
    let ask = async |buyer: Uuid| {
        let path = format!("/v1/orders?buyer_id={buyer}");
        let token = app.token(bob, Role::Buyer);
        send(app.request(Method::GET, &path).bearer_auth(token)).await
    };
    refused(&ask(ada).await, "forbidden", "never", json!({}));
    assert_eq!(ask(bob).await.expect(200).json()["data"], json!([]));
    app.finish().await;
}

#[tokio::test]
async fn a_sale_that_redis_did_not_get_is_unknown_until_a_retry_says_more() {
    let mut app = App::start().await;
    let sale = app.sale(json!({})).await;
    app.redis.server.stop().await;
    app.until("/readyz", |answer| answer.status == 503).await;
    let body = json!({
        "product_id": sale["product_id"], "allocation": 5, "per_buyer_limit": 2,
        "opens_at": "2020-01-01T00:00:00Z",
    });
    let make = |app: &App| {
        let request = app.operate(Method::POST, "/v1/sales");
        request.header("idempotency-key", "s").json(&body)
    };
    let answer = send(make(&app)).await;
    // PostgreSQL has it, and it will be sold as soon as Redis is back.
    document(&answer, 503, "unavailable", "unknown", "after", json!({}));
    app.redis.server.restart().await.unwrap();
    let made = async {
        loop {
            let answer = send(make(&app)).await;
            if answer.status == 201 {
                break answer;
            }
            assert_eq!(answer.status, 503, "{answer:?}");
            tokio::task::yield_now().await;
        }
    };
    let made = tokio::time::timeout(PATIENCE, made).await.unwrap();
    assert_eq!(made.header("idempotency-replayed"), Some("true"));
    let sales = app.get("/v1/sales").await.expect(200).json();
    assert_eq!(sales["data"].as_array().unwrap().len(), 2);
    app.finish().await;
}
