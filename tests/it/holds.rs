//! Orders that wait for their payment, and those who wait for what comes back.

use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use stockade::clock;
use uuid::Uuid;

use super::{
    selling::{acceptances, ask, assert_replays, cancel, refused, strangers, uuid},
    support::{
        app::{Answer, App, crowd, id, insist, send},
        wire::Wire,
    },
};

/// Long enough that no test ever waits for it.
const LONG: u64 = 3_600;

pub(crate) fn line(app: &App, method: Method, buyer: Uuid, sale: &str) -> RequestBuilder {
    ask(app, method, buyer, &format!("/v1/sales/{sale}/waitlist"))
}

pub(crate) fn join(app: &App, buyer: Uuid, sale: &str, quantity: u64, key: &str) -> RequestBuilder {
    line(app, Method::POST, buyer, sale)
        .header("Idempotency-Key", key)
        .json(&json!({ "quantity": quantity }))
}

async fn order(app: &App, order: &str) -> Value {
    let path = format!("/v1/orders/{order}");
    send(app.operate(Method::GET, &path))
        .await
        .expect(200)
        .json()
}

/// The orders of a buyer, once there are some in this sale.
async fn given(app: &App, buyer: Uuid, status: &str) -> Value {
    let path = format!("/v1/orders?buyer_id={buyer}&status={status}");
    let some = |answer: &Answer| answer.json()["data"] != json!([]);
    app.until(&path, some).await.json()["data"][0].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_pays_for_is_for_sale_again_when_its_time_is_over() {
    let app = App::start().await;
    let terms = json!({ "allocation": 3, "per_buyer_limit": 3, "hold_seconds": 1 });
    let sale = app.sale(terms).await;
    let sale = id(&sale);
    let buyer = clock::new_id();
    let first = app.buy(sale, buyer, "k", 3).await.expect(201);
    let bought = first.json();
    assert_eq!(bought["status"], "held");
    let view = app.view(sale).await;
    assert_eq!((&view["held"], &view["remaining"]), (&json!(3), &json!(0)));
    refused(
        &app.buy(sale, clock::new_id(), "k", 1).await,
        409,
        "sold_out",
    );

    let path = format!("/v1/sales/{sale}");
    let back = |answer: &Answer| answer.json()["remaining"] == 3;
    let view = app.until(&path, back).await.json();
    assert_eq!((&view["held"], &view["sold"]), (&json!(0), &json!(0)));
    let expired = order(&app, id(&bought)).await;
    assert_eq!(expired["status"], "expired");
    assert_eq!(expired["returned"], 3);
    // Not a moment before its time, by the clock that decides.
    let events = "SELECT (extract(epoch FROM at) * 1000)::bigint FROM round_events
        WHERE kind = 'expire'";
    app.audit(sale).await;
    let mut sql = super::support::app::sql(&app).await;
    let at: i64 = sqlx::query_scalar(events)
        .fetch_one(&mut sql)
        .await
        .unwrap();
    let until = bought["held_until"].as_str().unwrap();
    let until = chrono::DateTime::parse_from_rfc3339(until).unwrap();
    assert!(at >= until.timestamp_millis(), "{at} {until}");
    // The key still tells what was accepted, and others buy.
    let again = app.buy(sale, buyer, "k", 3).await;
    assert_replays(&again, &first);
    app.buy(sale, clock::new_id(), "k", 3).await.expect(201);
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn holds_end_while_a_node_is_gone_and_after_redis_died() {
    let mut app = App::start().await;
    let terms = json!({ "allocation": 40, "per_buyer_limit": 1, "hold_seconds": 2 });
    let sale = app.sale(terms).await;
    let sale = id(&sale);
    let bought = crowd(strangers(&app, sale, 40)).await;
    assert_eq!(acceptances(&bought).len(), 40);
    app.redis.server.kill().await;
    app.redis.server.restart().await.unwrap();
    // Who made them is gone; another node ends them.
    app.stop().await;
    let node = app.node().await;
    app.run().await;
    let path = format!("/v1/sales/{sale}");
    let back = |answer: &Answer| answer.status == 200 && answer.json()["remaining"] == 40;
    app.until(&path, back).await;
    assert_eq!(app.audit(sale).await["verdict"], "pass");
    node.stop().await;
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_back_goes_to_whoever_waits_longest() {
    let app = App::start().await;
    let terms = json!({
        "allocation": 4, "per_buyer_limit": 2, "hold_seconds": LONG, "waitlist": true,
    });
    let sale = app.sale(terms).await;
    let sale = id(&sale);
    let [first, second, third, public] = [0; 4].map(|_| clock::new_id());
    // There is nothing to wait for.
    refused(
        &send(join(&app, first, sale, 1, "w")).await,
        409,
        "conflict",
    );
    let owners = [0; 2].map(|_| clock::new_id());
    let mut orders = Vec::new();
    for owner in owners {
        let bought = app.buy(sale, owner, "k", 2).await.expect(201);
        orders.push(id(&bought.json()).to_owned());
    }
    let place = send(join(&app, first, sale, 2, "w")).await.expect(200);
    assert_eq!(place.json()["position"], 1);
    assert_eq!(place.json()["odds"], "unknown");
    let place = send(join(&app, second, sale, 1, "w")).await.expect(200);
    assert_eq!(place.json()["position"], 2);
    send(join(&app, third, sale, 1, "w")).await.expect(200);
    // Twice is once: the first wish stays.
    let again = send(join(&app, second, sale, 2, "other")).await.expect(200);
    assert_eq!(again.json()["position"], 2);
    assert_eq!(again.json()["quantity"], 1);
    refused(
        &send(join(&app, owners[0], sale, 1, "w")).await,
        409,
        "buyer_limit",
    );
    assert_eq!(app.view(sale).await["waiting"], 3);

    // Two units come back: both go to the first in line, before anybody else sees them.
    cancel(&app, owners[0], &orders[0]).await.expect(200);
    let got = given(&app, first, "held").await;
    assert_eq!(got["quantity"], 2);
    let view = app.view(sale).await;
    assert_eq!((&view["remaining"], &view["held"]), (&json!(0), &json!(4)));
    refused(&app.buy(sale, public, "k", 1).await, 409, "sold_out");
    // The key of the place tells which order it became.
    let became = send(join(&app, first, sale, 2, "w")).await.expect(201);
    assert_eq!(became.json()["id"], got["id"]);
    let other = send(join(&app, first, sale, 1, "w")).await;
    refused(&other, 422, "idempotency_key_mismatch");

    // Who leaves gets nothing, and what nobody waits for is for everybody.
    let left = send(line(&app, Method::DELETE, second, sale)).await;
    left.expect(204);
    send(line(&app, Method::DELETE, second, sale))
        .await
        .expect(204);
    send(line(&app, Method::GET, second, sale))
        .await
        .expect(404);
    let place = send(line(&app, Method::GET, third, sale)).await.expect(200);
    assert_eq!(place.json()["position"], 1);
    cancel(&app, owners[1], &orders[1]).await.expect(200);
    assert_eq!(given(&app, third, "held").await["quantity"], 1);
    let view = app.view(sale).await;
    assert_eq!(
        (&view["remaining"], &view["waiting"]),
        (&json!(1), &json!(0))
    );
    app.buy(sale, public, "k", 1).await.expect(201);
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_emptied_redis_brings_holds_and_the_line_back() {
    let app = App::start().await;
    let terms = json!({
        "allocation": 2, "per_buyer_limit": 1, "hold_seconds": LONG, "waitlist": true,
        "limit_scope": "sale",
    });
    let sale = app.sale(terms).await;
    let sale = id(&sale);
    let [first, second, waits, next] = [0; 4].map(|_| clock::new_id());
    let bought = app.buy(sale, first, "k", 1).await.expect(201);
    app.buy(sale, second, "k", 1).await.expect(201);
    send(join(&app, waits, sale, 1, "w")).await.expect(200);
    send(join(&app, next, sale, 1, "w")).await.expect(200);
    assert_eq!(app.audit(sale).await["verdict"], "pass");
    let before = order(&app, id(&bought.json())).await;

    let mut wire = Wire::connect(&app.redis).await;
    assert_eq!(wire.run(&["FLUSHALL"]).await, "OK");
    let doors = [app.door()];
    let again = app.purchase(sale, first, "k", json!({ "quantity": 1 }).to_string());
    assert_replays(&insist(again, &doors).await, &bought);
    let after = order(&app, id(&bought.json())).await;
    assert_eq!(after, before, "deadline and all");
    let place = line(&app, Method::GET, next, sale);
    assert_eq!(
        insist(place, &doors).await.expect(200).json()["position"],
        2
    );
    let limit = app.purchase(sale, first, "more", json!({ "quantity": 1 }).to_string());
    refused(&insist(limit, &doors).await, 409, "buyer_limit");
    cancel(&app, first, id(&bought.json())).await.expect(200);
    given(&app, waits, "held").await;
    let place = send(line(&app, Method::GET, next, sale)).await.expect(200);
    assert_eq!(place.json()["position"], 1);
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn operators_take_out_only_what_remains() {
    let app = App::start().await;
    let sale = app.sale(json!({ "allocation": 10 })).await;
    let sale = id(&sale);
    let reduce = |units: u64, key: &str| {
        app.operate(Method::POST, &format!("/v1/sales/{sale}/reduce"))
            .header("Idempotency-Key", key)
            .json(&json!({ "units": units }))
    };
    app.buy(sale, clock::new_id(), "k", 2).await.expect(201);
    let problem = refused(&send(reduce(9, "a")).await, 409, "insufficient");
    assert_eq!(problem["remaining"], 8);
    for again in [false, true] {
        let answer = send(reduce(5, "b")).await.expect(200);
        assert_eq!(answer.header("idempotency-replayed").is_some(), again);
        assert_eq!(answer.json()["allocation"], 5);
        assert_eq!(answer.json()["remaining"], 3);
    }
    refused(&send(reduce(4, "b")).await, 422, "idempotency_key_mismatch");
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_round_that_ends_with_its_last_unit_closes_when_it_is_paid() {
    let app = App::start().await;
    let terms = json!({ "allocation": 2, "per_buyer_limit": 1, "ends": "sold_out" });
    let at_once = app.sale(terms.clone()).await;
    let buyers = [0; 2].map(|_| clock::new_id());
    for buyer in buyers {
        app.buy(id(&at_once), buyer, "k", 1).await.expect(201);
    }
    assert_eq!(app.view(id(&at_once)).await["state"], "closed");

    let mut held = terms;
    held["hold_seconds"] = json!(LONG);
    let held = app.sale(held).await;
    let held = id(&held);
    let mut orders = Vec::new();
    for buyer in buyers {
        let bought = app.buy(held, buyer, "k", 1).await.expect(201);
        orders.push(uuid(&bought.json()["id"]));
    }
    for (left, (buyer, order)) in buyers.into_iter().zip(orders).enumerate() {
        let state = app.view(held).await["state"].clone();
        assert_eq!(state, "open", "{left} paid");
        let pay = ask(
            &app,
            Method::POST,
            buyer,
            &format!("/v1/orders/{order}/pay"),
        );
        let pay = pay.header("Idempotency-Key", "p").json(&json!({}));
        send(pay).await.expect(200);
    }
    assert_eq!(app.view(held).await["state"], "closed");
    app.finish().await;
}
