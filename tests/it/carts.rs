//! Carts: all of their lines, or none.

use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use stockade::clock;
use uuid::Uuid;

use super::{
    selling::{ask, assert_replays, refused},
    support::app::{App, crowd, id, send},
};

fn put(app: &App, buyer: Uuid, lines: &Value) -> RequestBuilder {
    ask(app, Method::PUT, buyer, "/v1/cart").json(&json!({ "lines": lines }))
}

pub(crate) fn checkout(app: &App, buyer: Uuid, key: &str) -> RequestBuilder {
    // The prefix of the alias, as the storefront uses it.
    ask(app, Method::POST, buyer, "/api/cart/checkout").header("Idempotency-Key", key)
}

pub(crate) async fn fill(app: &App, buyer: Uuid, lines: &[(&Value, u64)]) -> Value {
    let lines = lines.iter();
    let lines =
        lines.map(|(sale, quantity)| json!({ "sale_id": sale["id"], "quantity": quantity }));
    let lines = Value::Array(lines.collect());
    send(put(app, buyer, &lines)).await.expect(200).json()
}

async fn units(app: &App, sale: &Value) -> (Value, Value, Value) {
    let view = app.view(id(sale)).await;
    let units = |name: &str| view[name].clone();
    (units("remaining"), units("held"), units("sold"))
}

/// Two sales on two of four partitions, in the order in which a checkout asks.
pub(crate) async fn apart(app: &App) -> (Value, Value) {
    // Sales live where their ids say.
    let mut sales = Vec::new();
    for _ in 0..12 {
        sales.push(
            app.sale(json!({ "allocation": 100, "per_buyer_limit": 1 }))
                .await,
        );
    }
    let home = |sale: &Value| Uuid::parse_str(id(sale)).unwrap().as_u64_pair().1 % 4;
    sales.sort_by_key(home);
    let (low, high) = (sales.remove(0), sales.pop().unwrap());
    assert_ne!(
        home(&low),
        home(&high),
        "twelve ids on one of four partitions"
    );
    (low, high)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cart_is_bought_as_a_whole_once_for_its_key() {
    let app = App::start().await;
    let held = json!({ "allocation": 5, "hold_seconds": 3_600 });
    let (lamp, chair) = (app.sale(held).await, app.sale(json!({})).await);
    let buyer = clock::new_id();
    let cart = fill(&app, buyer, &[(&lamp, 1), (&chair, 1), (&lamp, 1)]).await;
    assert_eq!(cart["lines"].as_array().unwrap().len(), 2, "{cart}");
    assert_eq!(cart["lines"][0]["quantity"], 2);
    assert_eq!(cart["lines"][0]["total"]["amount"], 2 * 1999);

    let first = send(checkout(&app, buyer, "c")).await.expect(201);
    let body = first.json();
    let orders = body["orders"].as_array().unwrap();
    assert_eq!(orders[0]["status"], "held");
    assert_eq!(orders[1]["status"], "confirmed");
    assert_eq!(
        body["totals"],
        json!([{ "amount": 3 * 1999, "currency": "EUR" }])
    );
    assert_eq!(body["held_until"], orders[0]["held_until"]);
    assert_eq!(units(&app, &lamp).await, (json!(3), json!(2), json!(0)));
    let cart = send(ask(&app, Method::GET, buyer, "/v1/cart"))
        .await
        .expect(200);
    assert_eq!(cart.json()["lines"], json!([]));
    // Also with another cart, and after one of the orders went back.
    fill(&app, buyer, &[(&chair, 2)]).await;
    super::selling::cancel(&app, buyer, orders[0]["id"].as_str().unwrap())
        .await
        .expect(200);
    for again in crowd((0..8).map(|_| checkout(&app, buyer, "c"))).await {
        assert_replays(&again, &first);
    }
    assert_eq!(units(&app, &chair).await.0, json!(4));
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cart_that_cannot_be_had_as_a_whole_leaves_nothing_behind() {
    let app = App::start().await;
    let (full, empty) = (
        app.sale(json!({})).await,
        app.sale(json!({ "allocation": 1 })).await,
    );
    let closed = app
        .sale(json!({ "closes_at": "2021-01-01T00:00:00Z" }))
        .await;
    let buyer = clock::new_id();
    refused(&send(checkout(&app, buyer, "c")).await, 409, "conflict");
    app.buy(id(&empty), clock::new_id(), "k", 1)
        .await
        .expect(201);
    fill(&app, buyer, &[(&full, 1), (&empty, 1), (&closed, 1)]).await;
    let problem = refused(
        &send(checkout(&app, buyer, "c")).await,
        409,
        "checkout_failed",
    );
    let codes: Vec<_> = (0..3)
        .map(|at| problem["lines"][at]["code"].clone())
        .collect();
    assert_eq!(codes, ["left_out", "sold_out", "closed"], "{problem}");
    assert_eq!(units(&app, &full).await, (json!(5), json!(0), json!(0)));
    // Nothing was held for even a moment: the key may try again, and finds what is there now.
    fill(&app, buyer, &[(&full, 1)]).await;
    send(checkout(&app, buyer, "c")).await.expect(201);
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn over_several_partitions_a_cart_is_taken_back_and_says_so_for_ever() {
    let app = App::start_with(&[("STOCKADE_PARTITIONS", "4")]).await;
    let (low, high) = apart(&app).await;
    let (low, high) = (&low, &high);
    let buyer = clock::new_id();
    // The second partition refuses: this buyer has as many as may be had.
    app.buy(id(high), buyer, "before", 1).await.expect(201);
    fill(&app, buyer, &[(high, 1), (low, 1)]).await;
    let first = send(checkout(&app, buyer, "c")).await;
    let problem = refused(&first, 409, "checkout_failed");
    assert_eq!(problem["retry"], "never");
    assert_eq!(problem["lines"][0]["code"], "buyer_limit");
    assert_eq!(problem["lines"][1]["code"], "left_out");
    assert_eq!(units(&app, low).await, (json!(100), json!(0), json!(0)));
    // The first partition refuses: the others are not even asked.
    let other = clock::new_id();
    app.buy(id(low), other, "before", 1).await.expect(201);
    fill(&app, other, &[(high, 1), (low, 1)]).await;
    let none = refused(
        &send(checkout(&app, other, "c")).await,
        409,
        "checkout_failed",
    );
    assert_eq!(none["lines"][0]["code"], "left_out");
    assert_eq!(none["lines"][1]["code"], "buyer_limit");
    assert_ne!(none["retry"], "never");
    // The tombstone stays, whatever can be had by now.
    fill(&app, buyer, &[(low, 1)]).await;
    let again = refused(
        &send(checkout(&app, buyer, "c")).await,
        409,
        "checkout_failed",
    );
    assert_eq!(again["lines"], problem["lines"]);
    app.audit(id(low)).await;
    let withdrawn = format!("/v1/orders?buyer_id={buyer}&status=withdrawn");
    assert_eq!(app.pages(&withdrawn).await.len(), 1);
    send(checkout(&app, buyer, "d")).await.expect(201);

    // Crowds with carts over both: each whole, or not at all.
    let buyers: Vec<_> = (0..60).map(|_| clock::new_id()).collect();
    for buyer in &buyers {
        fill(&app, *buyer, &[(low, 1), (high, 1)]).await;
    }
    let answers = crowd(buyers.iter().map(|buyer| checkout(&app, *buyer, "c"))).await;
    let bought = answers.iter().filter(|answer| answer.status == 201).count();
    assert_eq!(bought, 60);
    assert_eq!(units(&app, low).await, (json!(38), json!(0), json!(62)));
    assert_eq!(units(&app, high).await, (json!(39), json!(0), json!(61)));
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn carts_beyond_their_limits_are_refused_at_their_place() {
    let app = App::start().await;
    let sale = app.sale(json!({})).await;
    let buyer = clock::new_id();
    let line = |quantity: i64| json!({ "sale_id": sale["id"], "quantity": quantity });
    let nowhere = json!({ "sale_id": clock::new_id(), "quantity": 1 });
    for (lines, status, pointer) in [
        (json!([line(0)]), 422, "#/lines/0/quantity"),
        (json!([line(1), line(1_000_000)]), 422, "#/lines/1/quantity"),
        (json!([line(1), nowhere]), 422, "#/lines/1/sale_id"),
        (
            json!([{ "sale_id": "lamp", "quantity": 1 }]),
            400,
            "#/lines/0/sale_id",
        ),
        (
            json!([{ "sale_id": sale["id"], "quantity": 1, "price": 1 }]),
            400,
            "#/lines/0/price",
        ),
        (
            Value::Array(
                (0..17)
                    .map(|_| json!({ "sale_id": clock::new_id(), "quantity": 1 }))
                    .collect(),
            ),
            422,
            "#/lines",
        ),
    ] {
        let answer = send(put(&app, buyer, &lines)).await;
        let problem = refused(&answer, status, "validation");
        assert_eq!(problem["errors"][0]["pointer"], pointer, "{lines}");
    }
    // Somebody who has not seen the present cart does not overwrite it.
    let filled = fill(&app, buyer, &[(&sale, 1)]).await;
    let stale = put(&app, buyer, &json!([])).header("If-Match", "\"99\"");
    refused(&send(stale).await, 412, "precondition_failed");
    let version = format!("\"{}\"", filled["version"]);
    send(put(&app, buyer, &json!([])).header("If-Match", version))
        .await
        .expect(200);
    app.finish().await;
}
