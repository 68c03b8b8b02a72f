//! Paying for held orders, with the sandbox and with a Stripe that is played: whatever goes wrong,
//! what is kept is what was sold.

use std::{collections::HashSet, sync::Arc, time::Duration};

use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};
use sqlx::Connection;
use stockade::{auth::Role, clock, payments::sign};
use tokio::task::JoinSet;
use uuid::Uuid;

use super::{
    gateways::{Manner, WEBHOOK_SECRET, approval, played_paypal, played_stripe},
    support::app::{Answer, App, PATIENCE, crowd, id, redirected, send, sql},
};

const PRICE: i64 = 1999;

/// A sale of ten whose buyers have this long to pay.
pub(crate) async fn sale(app: &App, hold_seconds: u32, more: Value) -> String {
    let mut terms = json!({
        "allocation": 10, "per_buyer_limit": 10, "payment": "sandbox", "hold_seconds": hold_seconds,
    });
    let members = more.as_object().unwrap().clone();
    terms.as_object_mut().unwrap().extend(members);
    let sale = app.sale(terms).await;
    id(&sale).to_owned()
}

/// Somebody with a held order.
struct Buyer {
    user: Uuid,
    order: String,
}

impl Buyer {
    async fn with(app: &App, sale: &str, quantity: u64) -> Self {
        let user = clock::new_id();
        let order = app
            .buy(sale, user, "buy", quantity)
            .await
            .expect(201)
            .json();
        assert_eq!(order["status"], "held");
        Self {
            user,
            order: id(&order).to_owned(),
        }
    }

    fn ask(&self, app: &App, method: Method, rest: &str) -> RequestBuilder {
        app.request(method, &format!("/v1/orders/{}{rest}", self.order))
            .bearer_auth(app.token(self.user, Role::Buyer))
    }

    fn paying(&self, app: &App, key: &str, method: &str) -> RequestBuilder {
        self.ask(app, Method::POST, "/pay")
            .header("Idempotency-Key", key)
            .json(&json!({ "payment_method": method }))
    }

    async fn pay(&self, app: &App, key: &str, method: &str) -> Answer {
        send(self.paying(app, key, method)).await
    }

    /// Waits until the order and its payment are so.
    async fn until(&self, app: &App, status: &str, payment: &str) -> Value {
        let path = format!("/v1/orders/{}", self.order);
        app.until(&path, |answer| {
            let order = answer.json();
            order["status"] == status && order["payment"]["state"] == payment
        })
        .await
        .json()
    }
}

/// What the toy bank keeps, and what our books say that we keep.
async fn kept(app: &App) -> (i64, i64) {
    let mut sql = sql(app).await;
    let bank: i64 = sqlx::query_scalar(
        "SELECT coalesce((SELECT sum(captured) FROM sandbox_charges), 0)::bigint
              - coalesce((SELECT sum(amount) FROM sandbox_refunds), 0)::bigint",
    )
    .fetch_one(&mut sql)
    .await
    .unwrap();
    let books: i64 =
        sqlx::query_scalar("SELECT coalesce(sum(captured - refunded), 0)::bigint FROM payments")
            .fetch_one(&mut sql)
            .await
            .unwrap();
    sql.close().await.unwrap();
    (bank, books)
}

/// The end: nothing is left to do, and the money is what was sold.
async fn balance(app: &App, sale: &str, sold: i64) {
    balance_of(app, &[(sale, sold)]).await;
}

/// The same over several sales.
pub(crate) async fn balance_of(app: &App, sales: &[(&str, i64)]) {
    let mut sql = sql(app).await;
    let settled = async {
        loop {
            let left: i64 = sqlx::query_scalar(
                "SELECT count(*) FROM payments
                 WHERE state NOT IN ('captured', 'voided', 'declined', 'refunded') OR refund_due > 0",
            )
            .fetch_one(&mut sql)
            .await
            .unwrap();
            if left == 0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_mins(1), settled)
        .await
        .unwrap();
    sql.close().await.unwrap();
    let all: i64 = sales.iter().map(|(_, sold)| sold).sum();
    assert_eq!(kept(app).await, (all * PRICE, all * PRICE));
    for (sale, sold) in sales {
        assert_eq!(app.view(sale).await["sold"], *sold);
        let audit = app.audit(sale).await;
        assert_eq!(audit["verdict"], "pass", "{audit:#}");
    }
}

#[tokio::test]
async fn a_held_order_is_paid_once_for_its_key() {
    let app = App::start().await;
    let sale = sale(&app, 600, json!({})).await;
    let buyer = Buyer::with(&app, &sale, 2).await;
    let before = send(buyer.ask(&app, Method::GET, ""))
        .await
        .expect(200)
        .json();
    assert_eq!(before["payment"], Value::Null);
    let paid = buyer
        .pay(&app, "pay", "sandbox_ok")
        .await
        .expect(200)
        .json();
    assert_eq!(paid["status"], "confirmed");
    let payment = &paid["payment"];
    assert_eq!(payment["state"], "captured");
    assert_eq!(
        payment["amount"],
        json!({ "amount": 2 * PRICE, "currency": "EUR" })
    );
    assert_eq!(
        (&payment["captured"], &payment["refunded"]),
        (&json!(2 * PRICE), &json!(0))
    );
    // Again and again, at the same time, and after a restart.
    let again = (0..16).map(|_| buyer.paying(&app, "pay", "sandbox_ok"));
    for answer in crowd(again).await {
        assert_eq!(answer.expect(200).json()["payment"]["id"], payment["id"]);
    }
    // The same key for something else, and another key for what is paid.
    let refused = buyer
        .pay(&app, "pay", "sandbox_slow")
        .await
        .expect(422)
        .json();
    assert_eq!(refused["code"], "idempotency_key_mismatch");
    let refused = buyer
        .pay(&app, "pay-2", "sandbox_ok")
        .await
        .expect(409)
        .json();
    assert_eq!(refused["code"], "conflict");
    // It is nobody else's to pay.
    let stranger = Buyer {
        user: clock::new_id(),
        order: buyer.order.clone(),
    };
    stranger.pay(&app, "pay", "sandbox_ok").await.expect(404);
    balance(&app, &sale, 2).await;
    app.finish().await;
}

#[tokio::test]
async fn a_decline_costs_nothing_and_another_method_may_pay() {
    let app = App::start().await;
    let sale = sale(&app, 600, json!({})).await;
    let buyer = Buyer::with(&app, &sale, 1).await;
    for (method, why) in [
        ("sandbox_insufficient_funds", "insufficient_funds"),
        ("sandbox_expired_card", "expired_card"),
        ("sandbox_declined", "declined"),
        ("pm_card_visa", "invalid_method"),
    ] {
        for _ in 0..2 {
            let declined = buyer.pay(&app, method, method).await.expect(402).json();
            assert_eq!(declined["code"], "payment_declined");
            assert_eq!(declined["decline"], why);
            assert!(declined["held_until"].is_string(), "{declined}");
        }
    }
    let order = send(buyer.ask(&app, Method::GET, "")).await.json();
    assert_eq!(order["status"], "held");
    assert_eq!(kept(&app).await, (0, 0));
    buyer.pay(&app, "works", "sandbox_ok").await.expect(200);
    balance(&app, &sale, 1).await;
    app.finish().await;
}

#[tokio::test]
async fn requests_that_cannot_pay_say_why() {
    let app = App::start().await;
    let sale = sale(&app, 600, json!({})).await;
    let buyer = Buyer::with(&app, &sale, 1).await;
    let bare = |body: Value| {
        buyer
            .ask(&app, Method::POST, "/pay")
            .header("Idempotency-Key", "k")
            .json(&body)
    };
    for (body, status) in [
        (json!({}), 422),
        (json!({ "payment_method": "" }), 422),
        (json!({ "payment_method": "a b" }), 422),
        (json!({ "payment_method": "x".repeat(256) }), 422),
        (json!({ "payment_method": null }), 400),
        (json!({ "payment_method": 1 }), 400),
        (json!({ "card": "4242424242424242" }), 400),
    ] {
        let refused = send(bare(body.clone())).await.expect(status).json();
        assert_eq!(refused["code"], "validation", "{body}");
    }
    let keyless = buyer.ask(&app, Method::POST, "/pay").json(&json!({}));
    assert_eq!(
        send(keyless).await.expect(400).json()["code"],
        "idempotency_key_missing"
    );

    // A gateway that nobody has configured, and a sale that gives no time to pay.
    for (terms, pointer) in [
        (
            json!({ "payment": "stripe", "hold_seconds": 60 }),
            "#/payment",
        ),
        (
            json!({ "payment": "paypal", "hold_seconds": 60 }),
            "#/payment",
        ),
        (json!({ "payment": "sandbox" }), "#/hold_seconds"),
    ] {
        let mut body = json!({ "allocation": 1, "per_buyer_limit": 1,
            "opens_at": "2020-01-01T00:00:00Z", "product_id": app.view(&sale).await["product_id"] });
        body.as_object_mut()
            .unwrap()
            .extend(terms.as_object().unwrap().clone());
        let refused = send(app.operate(Method::POST, "/v1/sales").json(&body)).await;
        assert_eq!(refused.expect(422).json()["errors"][0]["pointer"], pointer);
    }
    buyer.pay(&app, "k", "sandbox_ok").await.expect(200);
    balance(&app, &sale, 1).await;

    // Without a gateway, paying confirms.
    let free = app
        .sale(json!({ "allocation": 5, "per_buyer_limit": 5, "hold_seconds": 60 }))
        .await;
    let buyer = Buyer::with(&app, id(&free), 1).await;
    let with_money = buyer.pay(&app, "k", "sandbox_ok").await.expect(422);
    assert_eq!(
        with_money.json()["errors"][0]["pointer"],
        "#/payment_method"
    );
    for _ in 0..2 {
        let request = buyer
            .ask(&app, Method::POST, "/pay")
            .header("Idempotency-Key", "k2");
        let paid = send(request.json(&json!({}))).await.expect(200).json();
        assert_eq!(
            (&paid["status"], &paid["payment"]),
            (&json!("confirmed"), &Value::Null)
        );
    }
    app.finish().await;
}

#[tokio::test]
async fn lost_answers_pending_banks_and_repeated_webhooks_charge_once() {
    let app = App::start().await;
    let sale = sale(&app, 600, json!({})).await;
    for method in [
        "sandbox_lost_answer",
        "sandbox_lost_capture",
        "sandbox_noisy",
        "sandbox_pending",
        "sandbox_captures_at_once",
    ] {
        let buyer = Buyer::with(&app, &sale, 1).await;
        let first = buyer.pay(&app, "pay", method).await;
        assert!(
            [200, 202, 503].contains(&first.status.as_u16()),
            "{first:?}"
        );
        if first.status == 503 {
            let first = first.json();
            assert_eq!(first["code"], "gateway_unavailable");
            assert_eq!(first["outcome"], "unknown");
            assert!(first["held_until"].is_string(), "{first}");
        }
        buyer.until(&app, "confirmed", "captured").await;
        buyer.pay(&app, "pay", method).await.expect(200);
    }
    let buyer = Buyer::with(&app, &sale, 1).await;
    buyer
        .pay(&app, "pay", "sandbox_pending_declined")
        .await
        .expect(202);
    let declined = buyer.until(&app, "held", "declined").await;
    assert_eq!(declined["payment"]["decline"], "declined");
    balance(&app, &sale, 5).await;
    app.finish().await;
}

#[tokio::test]
async fn a_buyer_who_has_to_act_may_do_so_or_pay_otherwise() {
    let app = App::start().await;
    let sale = sale(&app, 600, json!({})).await;
    let decide = async |buyer: &Buyer, url: &str, approve: bool| {
        let request = app
            .request(Method::POST, url)
            .bearer_auth(app.token(buyer.user, Role::Buyer))
            .json(&json!({ "approve": approve }));
        send(request).await
    };
    let asked = async |buyer: &Buyer| {
        let answer = buyer
            .pay(&app, "pay", "sandbox_requires_action")
            .await
            .expect(202)
            .json();
        assert_eq!(answer["payment"]["state"], "requires_action");
        answer["payment"]["action"]["redirect_url"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let buyer = Buyer::with(&app, &sale, 1).await;
    let url = asked(&buyer).await;
    decide(&buyer, &url, true).await.expect(204);
    buyer.until(&app, "confirmed", "captured").await;
    decide(&buyer, &url, false).await.expect(409);
    decide(&buyer, "/v1/sandbox/toy_of_nobody", true)
        .await
        .expect(409);

    let buyer = Buyer::with(&app, &sale, 1).await;
    let url = asked(&buyer).await;
    decide(&buyer, &url, false).await.expect(204);
    let declined = buyer.until(&app, "held", "declined").await;
    assert_eq!(declined["payment"]["decline"], "authentication_failed");

    // Changes their mind: the first is let go, and cannot be approved any more.
    let buyer = Buyer::with(&app, &sale, 1).await;
    let url = asked(&buyer).await;
    buyer.pay(&app, "other", "sandbox_ok").await.expect(200);
    decide(&buyer, &url, true).await.expect(409);
    balance(&app, &sale, 2).await;
    app.finish().await;
}

#[tokio::test]
async fn who_never_pays_or_too_late_gets_nothing_charged_and_the_units_come_back() {
    let app = App::start().await;
    let sale = sale(&app, 1, json!({})).await;
    // One who never pays, one whose bank asks for something that nobody does.
    let never = Buyer::with(&app, &sale, 4).await;
    let asked = Buyer::with(&app, &sale, 3).await;
    let answer = asked
        .pay(&app, "pay", "sandbox_requires_action")
        .await
        .expect(202)
        .json();
    let url = answer["payment"]["action"]["redirect_url"]
        .as_str()
        .unwrap()
        .to_owned();
    app.until(&format!("/v1/sales/{sale}"), |answer| {
        answer.json()["remaining"] == 10
    })
    .await;
    let refused = never
        .pay(&app, "pay", "sandbox_ok")
        .await
        .expect(409)
        .json();
    assert_eq!(refused["code"], "hold_expired");
    asked.until(&app, "expired", "voided").await;
    let late = app
        .request(Method::POST, &url)
        .bearer_auth(app.token(asked.user, Role::Buyer))
        .json(&json!({ "approve": true }));
    send(late).await.expect(409);
    let refused = asked
        .pay(&app, "pay", "sandbox_requires_action")
        .await
        .expect(409)
        .json();
    assert_eq!(refused["code"], "hold_expired");
    balance(&app, &sale, 0).await;
    app.finish().await;
}

/// Has the toy bank take the money of a payment that waits for its buyer, without being asked.
async fn bank_takes(app: &App, order: &str) -> String {
    let mut sql = sql(app).await;
    let reference: String = sqlx::query_scalar(
        "UPDATE sandbox_charges AS charge SET state = 'captured', captured = charge.amount
         FROM payments, payment_orders AS paid
         WHERE payments.reference = charge.reference AND paid.payment_id = payments.id
           AND paid.order_id = $1::uuid
         RETURNING charge.reference",
    )
    .bind(order)
    .fetch_one(&mut sql)
    .await
    .unwrap();
    sql.close().await.unwrap();
    reference
}

/// A webhook as the toy bank signs it.
fn webhook(app: &App, event: &str, reference: &str) -> RequestBuilder {
    let body = json!({ "id": event, "object": "event", "type": "captured",
        "data": { "object": { "object": "payment_intent", "id": reference } } })
    .to_string();
    let secret = format!("sandbox webhooks {}", super::support::app::SECRET);
    let header = sign(&secret.into(), body.as_bytes(), clock::now().timestamp());
    app.request(Method::POST, "/v1/webhooks/sandbox")
        .header("Sandbox-Signature", header)
        .body(body)
}

#[tokio::test]
async fn money_that_comes_too_late_buys_again_or_goes_back() {
    let app = App::start().await;
    let sale = sale(&app, 2, json!({})).await;
    let expired = async |quantity| {
        let buyer = Buyer::with(&app, &sale, quantity).await;
        buyer
            .pay(&app, "pay", "sandbox_requires_action")
            .await
            .expect(202);
        buyer.until(&app, "expired", "voided").await;
        buyer
    };
    // Units are left: they are bought again.
    let lucky = expired(2).await;
    let reference = bank_takes(&app, &lucky.order).await;
    // A thousand times, in any order, from everywhere.
    for _ in 0..10 {
        let webhooks = (0..100).map(|n| webhook(&app, &format!("evt_{}", n % 10), &reference));
        for answer in crowd(webhooks).await {
            answer.expect(204);
        }
    }
    let order = lucky.until(&app, "expired", "captured").await;
    assert_eq!(order["payment"]["refund_due"], 0);
    let orders = app
        .pages(&format!("/v1/orders?sale_id={sale}&status=confirmed"))
        .await;
    assert_eq!(app.view(&sale).await["sold"], 2);
    assert!(
        orders
            .iter()
            .all(|order| order["buyer_id"] == lucky.user.to_string())
    );

    // Nothing is left: all of it goes back.
    let unlucky = expired(3).await;
    let others = Buyer::with(&app, &sale, 8).await;
    others.pay(&app, "pay", "sandbox_ok").await.expect(200);
    let reference = bank_takes(&app, &unlucky.order).await;
    send(webhook(&app, "evt_late", &reference))
        .await
        .expect(204);
    let order = unlucky.until(&app, "expired", "refunded").await;
    assert_eq!(order["payment"]["refunded"], 3 * PRICE);
    balance(&app, &sale, 10).await;
    app.finish().await;
}

#[tokio::test]
async fn forged_webhooks_are_refused_and_genuine_ones_are_only_hints() {
    let app = App::start().await;
    let sale = sale(&app, 600, json!({})).await;
    let buyer = Buyer::with(&app, &sale, 1).await;
    buyer
        .pay(&app, "pay", "sandbox_requires_action")
        .await
        .expect(202);
    let mut sql = sql(&app).await;
    let reference: String = sqlx::query_scalar("SELECT reference FROM payments")
        .fetch_one(&mut sql)
        .await
        .unwrap();
    // It says "captured", and the bank knows nothing of it: nothing is believed.
    for n in 0..20 {
        send(webhook(&app, &format!("evt_{n}"), &reference))
            .await
            .expect(204);
    }
    let body = json!({ "id": "evt_x", "type": "captured",
        "data": { "object": { "object": "payment_intent", "id": reference } } })
    .to_string();
    let now = clock::now().timestamp();
    let right = format!("sandbox webhooks {}", super::support::app::SECRET);
    let forged = [
        None,
        Some(sign(&"another secret".into(), body.as_bytes(), now)),
        Some(sign(&right.clone().into(), body.as_bytes(), now - 301)),
        Some(sign(&right.clone().into(), body.as_bytes(), now + 301)),
        Some(sign(&right.clone().into(), b"{}", now)),
        Some("t=1,v1=".to_owned()),
    ];
    for header in forged {
        let mut request = app
            .request(Method::POST, "/v1/webhooks/sandbox")
            .body(body.clone());
        if let Some(header) = &header {
            request = request.header("Sandbox-Signature", header);
        }
        let refused = send(request).await.expect(400).json();
        assert_eq!(refused["code"], "webhook_invalid", "{header:?}");
    }
    // Signed, and no event; too large; for a gateway that is not there.
    for (text, status) in [("{}".to_owned(), 400), (" ".repeat(300_000), 413)] {
        let header = sign(&right.clone().into(), text.as_bytes(), now);
        let request = app.request(Method::POST, "/v1/webhooks/sandbox");
        send(request.header("Sandbox-Signature", header).body(text))
            .await
            .expect(status);
    }
    for gateway in ["stripe", "nobody"] {
        let request = app.request(Method::POST, &format!("/v1/webhooks/{gateway}"));
        send(request.body("{}")).await.expect(400);
    }
    let events: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM gateway_events WHERE event LIKE 'evt\\__' OR event LIKE 'evt\\___'",
    )
    .fetch_one(&mut sql)
    .await
    .unwrap();
    assert_eq!(events, 20, "each once, and none that was forged");
    sql.close().await.unwrap();
    buyer.until(&app, "held", "requires_action").await;
    assert_eq!(kept(&app).await, (0, 0));
    let cancel = buyer.ask(&app, Method::POST, "/cancel");
    send(cancel).await.expect(200);
    balance(&app, &sale, 0).await;
    app.finish().await;
}

#[tokio::test]
async fn cancelled_and_refunded_orders_give_the_money_back_once() {
    let app = App::start().await;
    let sale = sale(&app, 600, json!({})).await;
    let (first, second) = (
        Buyer::with(&app, &sale, 3).await,
        Buyer::with(&app, &sale, 5).await,
    );
    for buyer in [&first, &second] {
        buyer.pay(&app, "pay", "sandbox_ok").await.expect(200);
    }
    for _ in 0..3 {
        let cancelled = send(first.ask(&app, Method::POST, "/cancel"))
            .await
            .expect(200)
            .json();
        assert_eq!(cancelled["status"], "cancelled");
    }
    let order = first.until(&app, "cancelled", "refunded").await;
    assert_eq!(order["payment"]["refunded"], 3 * PRICE);
    let refund = |key: &str, body: Value| {
        app.operate(Method::POST, &format!("/v1/orders/{}/refund", second.order))
            .header("Idempotency-Key", key)
            .json(&body)
    };
    for _ in 0..2 {
        let some = refund("some", json!({ "quantity": 2, "reason": "broken" }));
        let order = send(some).await.expect(200).json();
        assert_eq!(order["payment"]["refunded"], 2 * PRICE, "{order}");
        assert_eq!(order["status"], "confirmed");
    }
    let other = refund("some", json!({ "quantity": 1 }));
    assert_eq!(
        send(other).await.expect(422).json()["code"],
        "idempotency_key_mismatch"
    );
    send(refund("too-much", json!({ "quantity": 4 })))
        .await
        .expect(409);
    send(refund("none", json!({ "quantity": 0 })))
        .await
        .expect(422);
    balance(&app, &sale, 3).await;
    send(refund("rest", json!({}))).await.expect(200);
    let order = second.until(&app, "refunded", "refunded").await;
    assert_eq!(order["payment"]["refunded"], 5 * PRICE);
    // Only operators.
    let request = second
        .ask(&app, Method::POST, "/refund")
        .header("Idempotency-Key", "k");
    send(request.json(&json!({}))).await.expect(403);
    balance(&app, &sale, 0).await;
    app.finish().await;
}

#[tokio::test]
async fn a_bank_that_lies_fails_or_is_closed_leaves_the_order_to_its_buyer() {
    let app = App::start().await;
    let sale = sale(&app, 600, json!({})).await;
    let buyer = Buyer::with(&app, &sale, 1).await;
    let closed = buyer
        .pay(&app, "closed", "sandbox_outage")
        .await
        .expect(503);
    assert!(closed.header("retry-after").is_some());
    let closed = closed.json();
    assert_eq!(
        (&closed["code"], &closed["order_status"]),
        (&json!("gateway_unavailable"), &json!("held"))
    );
    send(buyer.ask(&app, Method::POST, "/cancel"))
        .await
        .expect(200);

    // The money is reserved and then gone: the order is taken back.
    let buyer = Buyer::with(&app, &sale, 2).await;
    let failed = buyer
        .pay(&app, "fails", "sandbox_capture_fails")
        .await
        .expect(402)
        .json();
    assert_eq!(failed["decline"], "lapsed");
    buyer.until(&app, "cancelled", "voided").await;

    // Another amount: nothing of it is believed, and nothing taken.
    let buyer = Buyer::with(&app, &sale, 3).await;
    let wrong = buyer.pay(&app, "wrong", "sandbox_wrong_amount").await;
    assert_ne!(wrong.status, 200, "{wrong:?}");
    let order = send(buyer.ask(&app, Method::GET, "")).await.json();
    assert_eq!(order["status"], "held");
    assert_eq!(kept(&app).await, (0, 0));
    buyer.pay(&app, "right", "sandbox_ok").await.expect(200);
    assert_eq!(app.view(&sale).await["sold"], 3);
    assert_eq!(kept(&app).await, (3 * PRICE, 3 * PRICE));
    app.finish().await;
}

#[tokio::test]
async fn a_crowd_of_payers_on_two_nodes_keeps_what_it_sold() {
    let app = Arc::new(App::start().await);
    let other = app.node().await;
    let sale = sale(&app, 10, json!({ "allocation": 40 })).await;
    let methods = [
        "sandbox_ok",
        "sandbox_lost_answer",
        "sandbox_lost_capture",
        "sandbox_insufficient_funds",
        "sandbox_noisy",
        "sandbox_captures_at_once",
        "sandbox_capture_fails",
        "sandbox_requires_action",
        "",
        "sandbox_pending",
    ];
    let mut paying = JoinSet::new();
    for n in 0..40 {
        let (app, sale, url) = (Arc::clone(&app), sale.clone(), n % 2 == 0);
        let door = other.door();
        let method = methods[n % methods.len()];
        paying.spawn(async move {
            let buyer = Buyer::with(&app, &sale, 1).await;
            if method.is_empty() {
                return;
            }
            for _ in 0..3 {
                let mut request = buyer.paying(&app, "pay", method);
                if url {
                    let url = door.borrow().clone();
                    request = redirected(request, &url);
                }
                let answer = send(request).await;
                assert!(
                    [200, 202, 402, 409, 503].contains(&answer.status.as_u16()),
                    "{method}: {answer:?}"
                );
            }
        });
    }
    paying.join_all().await;
    app.until(&format!("/v1/sales/{sale}"), |answer| {
        answer.json()["held"] == 0
    })
    .await;
    let sold = app.view(&sale).await["sold"].as_i64().unwrap();
    balance(&app, &sale, sold).await;
    assert!(sold >= 16, "{sold}");
    other.stop().await;
    Arc::into_inner(app).unwrap().finish().await;
}

#[tokio::test]
async fn a_hold_is_extended_once() {
    let app = App::start().await;
    let sale = sale(&app, 60, json!({})).await;
    let buyer = Buyer::with(&app, &sale, 1).await;
    let extend = || buyer.ask(&app, Method::POST, "/extend");
    let before = send(buyer.ask(&app, Method::GET, "")).await.json();
    let first = send(extend()).await.expect(200).json();
    assert_ne!(first["held_until"], before["held_until"]);
    let again = send(extend()).await.expect(200).json();
    assert_eq!(again["held_until"], first["held_until"]);
    buyer.pay(&app, "pay", "sandbox_ok").await.expect(200);
    send(extend()).await.expect(409);
    balance(&app, &sale, 1).await;
    app.finish().await;
}

/// Somebody with an accepted checkout of some sales.
pub(crate) struct Customer {
    user: Uuid,
    checkout: String,
    pub(crate) orders: Vec<String>,
}

impl Customer {
    pub(crate) async fn with(app: &App, lines: &[(&str, u64)]) -> Self {
        let user = clock::new_id();
        let ask = |method, path| {
            app.request(method, path)
                .bearer_auth(app.token(user, Role::Buyer))
        };
        let lines = lines.iter();
        let lines = lines.map(|(sale, quantity)| json!({ "sale_id": sale, "quantity": quantity }));
        let cart = json!({ "lines": lines.collect::<Vec<_>>() });
        send(ask(Method::PUT, "/v1/cart").json(&cart))
            .await
            .expect(200);
        let checkout = ask(Method::POST, "/v1/cart/checkout").header("Idempotency-Key", "buy");
        let checkout = send(checkout).await.expect(201).json();
        let orders = checkout["orders"].as_array().unwrap().iter();
        Self {
            user,
            checkout: id(&checkout).to_owned(),
            orders: orders.map(|order| id(order).to_owned()).collect(),
        }
    }

    fn ask(&self, app: &App, method: Method, rest: &str) -> RequestBuilder {
        app.request(method, &format!("/v1/checkouts/{}{rest}", self.checkout))
            .bearer_auth(app.token(self.user, Role::Buyer))
    }

    pub(crate) fn paying(&self, app: &App, key: &str, method: &str) -> RequestBuilder {
        self.ask(app, Method::POST, "/pay")
            .header("Idempotency-Key", key)
            .json(&json!({ "payment_method": method }))
    }

    async fn pay(&self, app: &App, key: &str, method: &str) -> Answer {
        send(self.paying(app, key, method)).await
    }

    pub(crate) async fn view(&self, app: &App) -> Value {
        send(self.ask(app, Method::GET, ""))
            .await
            .expect(200)
            .json()
    }

    /// One of its orders by itself.
    fn one(&self, at: usize) -> Buyer {
        Buyer {
            user: self.user,
            order: self.orders[at].clone(),
        }
    }
}

#[tokio::test]
async fn a_checkout_is_paid_with_one_payment_and_refunded_order_by_order() {
    let app = App::start().await;
    let (lamp, chair) = (
        sale(&app, 600, json!({})).await,
        sale(&app, 600, json!({})).await,
    );
    // Sold without a hold: it is no part of the payment.
    let free = app.sale(json!({})).await;
    let free = id(&free);
    let customer = Customer::with(&app, &[(&lamp, 2), (free, 1), (&chair, 3)]).await;
    let before = customer.view(&app).await;
    assert_eq!(
        (&before["state"], &before["payment"]),
        (&json!("accepted"), &Value::Null)
    );

    // A bank that says no leaves all of it to the buyer.
    for _ in 0..2 {
        let declined = customer.pay(&app, "no", "sandbox_insufficient_funds").await;
        let declined = declined.expect(402).json();
        assert_eq!(declined["decline"], "insufficient_funds");
        assert!(declined["held_until"].is_string(), "{declined}");
    }
    assert_eq!(kept(&app).await, (0, 0));

    let again = (0..8).map(|_| customer.paying(&app, "pay", "sandbox_ok"));
    for answer in crowd(again).await {
        let paid = answer.expect(200).json();
        assert_eq!(paid["payment"]["state"], "captured", "{paid}");
        assert_eq!(paid["payment"]["captured"], 5 * PRICE);
        for at in 0..3 {
            assert_eq!(paid["orders"][at]["status"], "confirmed");
        }
    }
    let paid = customer.view(&app).await;
    assert_eq!(paid["orders"][0]["payment"]["id"], paid["payment"]["id"]);
    assert_eq!(paid["orders"][1]["payment"], Value::Null);
    let bare = customer
        .ask(&app, Method::POST, "/pay")
        .header("Idempotency-Key", "pay");
    let mismatch = send(bare.json(&json!({ "payment_method": "sandbox_slow" }))).await;
    assert_eq!(
        mismatch.expect(422).json()["code"],
        "idempotency_key_mismatch"
    );
    for refused in [
        customer.pay(&app, "pay-2", "sandbox_ok").await,
        customer.one(0).pay(&app, "pay-2", "sandbox_ok").await,
    ] {
        assert_eq!(refused.expect(409).json()["code"], "conflict");
    }
    // It is nobody else's to see or to pay.
    let stranger = Customer {
        user: clock::new_id(),
        checkout: customer.checkout.clone(),
        orders: vec![],
    };
    send(stranger.ask(&app, Method::GET, "")).await.expect(404);
    stranger.pay(&app, "pay", "sandbox_ok").await.expect(404);

    // A unit of the one, then all of the other.
    let refund = app
        .operate(
            Method::POST,
            &format!("/v1/orders/{}/refund", customer.orders[0]),
        )
        .header("Idempotency-Key", "some")
        .json(&json!({ "quantity": 1 }));
    send(refund).await.expect(200);
    let books = [(lamp.as_str(), 1), (chair.as_str(), 3)];
    balance_of(&app, &books).await;
    let cancel = customer.one(2).ask(&app, Method::POST, "/cancel");
    send(cancel).await.expect(200);
    balance_of(&app, &[(&lamp, 1), (&chair, 0)]).await;
    let after = customer.view(&app).await;
    assert_eq!(after["payment"]["refunded"], 4 * PRICE, "{after}");
    assert_eq!(after["payment"]["state"], "captured");
    let cancel = customer.one(0).ask(&app, Method::POST, "/cancel");
    send(cancel).await.expect(200);
    balance_of(&app, &[(&lamp, 0), (&chair, 0)]).await;
    let after = customer.view(&app).await;
    assert_eq!(after["payment"]["state"], "refunded", "{after}");
    app.finish().await;
}

#[tokio::test]
async fn a_checkout_of_which_an_order_has_expired_is_not_paid() {
    let app = App::start().await;
    let (long, short) = (
        sale(&app, 600, json!({})).await,
        sale(&app, 2, json!({})).await,
    );
    let customer = Customer::with(&app, &[(&long, 1), (&short, 2)]).await;
    let asked = customer.pay(&app, "pay", "sandbox_requires_action").await;
    let asked = asked.expect(202).json();
    let url = asked["payment"]["action"]["redirect_url"].as_str().unwrap();
    let path = format!("/v1/orders/{}", customer.orders[1]);
    app.until(&path, |answer| answer.json()["status"] == "expired")
        .await;
    // Too late, or just not heard.
    let approve = app
        .request(Method::POST, url)
        .bearer_auth(app.token(customer.user, Role::Buyer));
    send(approve.json(&json!({ "approve": true }))).await;
    customer.one(0).until(&app, "held", "voided").await;
    for key in ["pay", "pay", "another"] {
        let refused = customer.pay(&app, key, "sandbox_requires_action").await;
        let refused = refused.expect(409).json();
        assert_eq!(refused["code"], "hold_expired", "{refused}");
        assert_eq!(refused["order_ids"], json!([customer.orders[1]]));
    }
    assert_eq!(kept(&app).await, (0, 0));
    // What is still held can be paid by itself.
    let paid = customer.one(0).pay(&app, "alone", "sandbox_ok").await;
    paid.expect(200);
    balance_of(&app, &[(&long, 1), (&short, 0)]).await;
    app.finish().await;
}

#[tokio::test]
async fn an_order_that_is_given_back_meanwhile_is_not_paid_with_its_checkout() {
    let app = App::start().await;
    let (lamp, chair) = (
        sale(&app, 600, json!({})).await,
        sale(&app, 600, json!({})).await,
    );
    for method in ["sandbox_requires_action", "sandbox_captures_at_once"] {
        let customer = Customer::with(&app, &[(&lamp, 1), (&chair, 2)]).await;
        let asks = method == "sandbox_requires_action";
        let first = if asks {
            customer.pay(&app, "pay", method).await
        } else {
            let cancel = customer.one(1).ask(&app, Method::POST, "/cancel");
            send(cancel).await.expect(200);
            customer.pay(&app, "pay", method).await
        };
        if asks {
            let cancel = customer.one(1).ask(&app, Method::POST, "/cancel");
            send(cancel).await.expect(200);
            let asked = first.expect(202).json();
            let url = asked["payment"]["action"]["redirect_url"].as_str().unwrap();
            let approve = app
                .request(Method::POST, url)
                .bearer_auth(app.token(customer.user, Role::Buyer));
            send(approve.json(&json!({ "approve": true })))
                .await
                .expect(204);
        }
        customer.one(0).until(&app, "confirmed", "captured").await;
        let paid = customer.pay(&app, "pay", method).await.expect(200).json();
        assert_eq!(paid["orders"][1]["status"], "cancelled", "{paid}");
    }
    balance_of(&app, &[(&lamp, 2), (&chair, 0)]).await;
    app.finish().await;
}

#[tokio::test]
async fn a_checkout_that_one_payment_cannot_pay_says_which_lines() {
    let app = App::start().await;
    let paid = sale(&app, 600, json!({})).await;
    let dollars = json!({ "price": { "amount": PRICE, "currency": "USD" } });
    let dollars = sale(&app, 600, dollars).await;
    let free = app.sale(json!({ "hold_seconds": 600 })).await;
    for (other, payment, currency) in [
        (dollars.as_str(), "sandbox", "USD"),
        (id(&free), "none", "EUR"),
    ] {
        let customer = Customer::with(&app, &[(&paid, 1), (other, 1)]).await;
        let refused = customer.pay(&app, "pay", "sandbox_ok").await;
        let refused = refused.expect(409).json();
        assert_eq!(refused["code"], "conflict");
        assert_eq!(
            refused["lines"],
            json!([
                { "order_id": customer.orders[0], "sale_id": paid, "payment": "sandbox", "currency": "EUR" },
                { "order_id": customer.orders[1], "sale_id": other, "payment": payment, "currency": currency },
            ])
        );
    }
    // Without any money, paying confirms.
    let customer = Customer::with(&app, &[(id(&free), 1)]).await;
    customer.pay(&app, "pay", "sandbox_ok").await.expect(422);
    for _ in 0..2 {
        let confirm = customer
            .ask(&app, Method::POST, "/pay")
            .header("Idempotency-Key", "free");
        let confirmed = send(confirm.json(&json!({}))).await.expect(200).json();
        assert_eq!(confirmed["orders"][0]["status"], "confirmed");
    }
    app.finish().await;
}

/// Sends the same payment again until it is done: the breaker may stand in between.
async fn insists(app: &App, buyer: &Buyer, key: &str) -> Value {
    let paid = async {
        loop {
            let answer = buyer.pay(app, key, "pm_card_visa").await;
            if answer.status == 200 {
                return answer.json();
            }
            assert!([202, 503].contains(&answer.status.as_u16()), "{answer:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(PATIENCE, paid).await.unwrap()
}

#[tokio::test]
async fn stripe_is_paid_once_though_it_fails_in_every_way() {
    let (played, url) = played_stripe().await;
    let app = App::start_with(&[
        ("STOCKADE_STRIPE_URL", &url),
        ("STOCKADE_STRIPE_SECRET_KEY", "sk_test_of_the_tests"),
        ("STOCKADE_STRIPE_WEBHOOK_SECRET", WEBHOOK_SECRET),
        ("STOCKADE_REQUEST_TIMEOUT_MS", "3000"),
    ])
    .await;
    let sale = sale(&app, 600, json!({ "payment": "stripe" })).await;
    // It does what it is asked for, and nobody hears of it.
    let silent = [
        Manner {
            answer: Some((500, "oops")),
            ..Manner::default()
        },
        Manner {
            dies: true,
            ..Manner::default()
        },
    ];
    for manner in silent {
        let buyer = Buyer::with(&app, &sale, 1).await;
        played.behave(manner);
        for _ in 0..8 {
            let down = buyer.pay(&app, "pay", "pm_card_visa").await.expect(503);
            assert!(down.header("retry-after").is_some());
            let down = down.json();
            assert_eq!(down["code"], "gateway_unavailable");
            assert_eq!(down["outcome"], "unknown");
            assert_eq!(down["order_status"], "held");
            assert!(down["held_until"].is_string());
        }
        let calls = played.heard().len();
        assert!(
            calls < 8,
            "the breaker keeps {calls} calls from a gateway that is down"
        );
        played.behave(Manner::default());
        insists(&app, &buyer, "pay").await;
        let order = buyer.until(&app, "confirmed", "captured").await;
        assert_eq!(order["payment"]["captured"], PRICE, "{order}");
        once_each(&played.heard());
    }
    // It asks for another amount than it was told: nothing is paid, and nothing is lost.
    let buyer = Buyer::with(&app, &sale, 2).await;
    played.behave(Manner {
        lies: vec![("/amount", json!(1))],
        ..Manner::default()
    });
    let lied = buyer.pay(&app, "lied", "pm_card_visa").await.expect(402);
    assert_eq!(lied.json()["order_status"], "held");
    let asked = |(asked, ..): &(String, String, String)| asked.ends_with("/capture");
    assert!(!played.heard().iter().any(asked));
    // Slower than anybody waits.
    played.behave(Manner {
        slow: Duration::from_millis(1_200),
        ..Manner::default()
    });
    insists(&app, &buyer, "pay").await;
    let order = buyer.until(&app, "confirmed", "captured").await;
    assert_eq!(order["payment"]["captured"], 2 * PRICE);
    played.behave(Manner::default());

    // A webhook only has it asked again.
    let body = json!({ "id": "evt_1", "type": "payment_intent.canceled",
        "data": { "object": { "object": "payment_intent", "id": "pi_4" } } })
    .to_string();
    let header = sign(
        &WEBHOOK_SECRET.into(),
        body.as_bytes(),
        clock::now().timestamp(),
    );
    for _ in 0..3 {
        let webhook = app
            .request(Method::POST, "/v1/webhooks/stripe")
            .header("Stripe-Signature", &header)
            .body(body.clone());
        send(webhook).await.expect(204);
    }
    let refund = app
        .operate(Method::POST, &format!("/v1/orders/{}/refund", buyer.order))
        .header("Idempotency-Key", "back")
        .json(&json!({ "quantity": 1 }));
    send(refund).await.expect(200);
    let path = format!("/v1/orders/{}", buyer.order);
    app.until(&path, |answer| {
        answer.json()["payment"]["refunded"] == PRICE
    })
    .await;
    once_each(&played.heard());
    assert_eq!(app.view(&sale).await["sold"], 3);
    let audit = app.audit(&sale).await;
    assert_eq!(audit["verdict"], "pass", "{audit:#}");
    app.finish().await;
}

#[tokio::test]
async fn paypal_is_paid_once_the_buyer_has_approved_and_only_then() {
    let (played, url) = played_paypal().await;
    let app = App::start_with(&[
        ("STOCKADE_PAYPAL_URL", &url),
        ("STOCKADE_PAYPAL_CLIENT_ID", "client"),
        ("STOCKADE_PAYPAL_CLIENT_SECRET", "secret"),
        ("STOCKADE_PAYPAL_WEBHOOK_ID", "WH-1"),
        ("STOCKADE_REQUEST_TIMEOUT_MS", "3000"),
    ])
    .await;
    let hear = async |event: &str, order: &str, signature: &str| {
        let (headers, body) = approval(event, order, signature);
        let webhook = app.request(Method::POST, "/v1/webhooks/paypal");
        send(webhook.headers(headers).body(body)).await
    };
    let long = sale(&app, 600, json!({ "payment": "paypal" })).await;
    let buyer = Buyer::with(&app, &long, 2).await;
    for _ in 0..3 {
        let asked = buyer.pay(&app, "pay", "paypal").await.expect(202).json();
        let url = &asked["payment"]["action"]["redirect_url"];
        assert_eq!(url, "https://paypal.example/approve", "{asked}");
    }
    // Who says that it was approved is asked, and so is whoever is said to have been.
    let refused = hear("1", "ORDER1", "forged").await.expect(400).json();
    assert_eq!(refused["code"], "webhook_invalid");
    hear("1", "ORDER1", "genuine").await.expect(204);
    assert_eq!(
        buyer.pay(&app, "pay", "paypal").await.status,
        StatusCode::ACCEPTED
    );
    assert!(!played.has("authorizations"));

    assert_eq!(played.approve(), "ORDER1");
    for event in ["2", "2", "3"] {
        hear(event, "ORDER1", "genuine").await.expect(204);
    }
    let order = buyer.until(&app, "confirmed", "captured").await;
    assert_eq!(order["payment"]["captured"], 2 * PRICE, "{order}");
    let again = buyer.pay(&app, "pay", "paypal").await.expect(200).json();
    assert_eq!(again["payment"]["captured"], 2 * PRICE);
    for _ in 0..2 {
        let refund = app
            .operate(Method::POST, &format!("/v1/orders/{}/refund", buyer.order))
            .header("Idempotency-Key", "one")
            .json(&json!({ "quantity": 1 }));
        let after = send(refund).await.expect(200).json();
        assert_eq!(after["payment"]["refunded"], PRICE, "{after}");
    }
    once_each(&played.heard());

    // Approved when the time had run out: nothing is reserved, nothing is taken.
    let short = sale(&app, 2, json!({ "payment": "paypal" })).await;
    let late = Buyer::with(&app, &short, 1).await;
    late.pay(&app, "pay", "paypal").await.expect(202);
    late.until(&app, "expired", "voided").await;
    assert_eq!(played.approve(), "ORDER2");
    hear("4", "ORDER2", "genuine").await.expect(204);
    let refused = late.pay(&app, "again", "paypal").await.expect(409);
    assert_eq!(refused.json()["code"], "hold_expired");
    assert!(!played.has("authorizations") && !played.has("captures"));

    for (sale, sold) in [(&long, 1), (&short, 0)] {
        assert_eq!(app.view(sale).await["sold"], sold);
        let audit = app.audit(sale).await;
        assert_eq!(audit["verdict"], "pass", "{audit:#}");
    }
    app.finish().await;
}

/// Whatever was asked how often: each step of money had one idempotency key.
fn once_each(heard: &[(String, String, String)]) {
    for step in ["/confirm", "/authorize", "/capture", "/refund", "/refunds"] {
        let keys = heard.iter().filter(|(asked, ..)| asked.ends_with(step));
        let keys: HashSet<_> = keys.map(|(_, key, _)| key).collect();
        assert!(keys.len() <= 1, "{step}: {heard:?}");
    }
}
