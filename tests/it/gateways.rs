//! Gateways against servers that play them: honest, lying, slow, dying in the middle of an answer.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{Path, State},
    http::{HeaderMap, HeaderName, Method, StatusCode, Uri},
    response::{IntoResponse, Response},
    routing::any,
};
use futures::stream;
use serde_json::{Value, json};
use stockade::{
    clock,
    domain::{
        id::PaymentId,
        money::{Currency, Money},
        payment::{Action, Charge, Decline, Seen},
    },
    payments::{
        Found, Gateway, Paypal, PaypalSettings, Refund, Stripe, StripeSettings, Trouble,
        Unverified, sign,
    },
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

pub(crate) const WEBHOOK_SECRET: &str = "whsec_of_the_tests";

/// How a played gateway behaves.
#[derive(Clone, Debug, Default)]
pub(crate) struct Manner {
    /// Replaces members of every answer: pointer and value.
    pub(crate) lies: Vec<(&'static str, Value)>,
    /// Answers this instead, after doing what it was asked for.
    pub(crate) answer: Option<(u16, &'static str)>,
    /// Dies in the middle of every answer, after doing what it was asked for.
    pub(crate) dies: bool,
    /// Takes so long to hear.
    pub(crate) slow: Duration,
}

/// What a played gateway has heard: method and path, idempotency key, body.
pub(crate) type Heard = Vec<(String, String, String)>;

#[derive(Clone, Default)]
pub(crate) struct Played {
    manner: Arc<Mutex<Manner>>,
    heard: Arc<Mutex<Heard>>,
    /// What it has of its one payment.
    payment: Arc<Mutex<Value>>,
    /// Answers by idempotency key.
    told: Arc<Mutex<HashMap<String, Value>>>,
}

impl Played {
    pub(crate) fn behave(&self, manner: Manner) {
        *self.manner.lock().unwrap() = manner;
    }

    fn lie(&self, pointer: &'static str, value: Value) {
        let lies = vec![(pointer, value)];
        self.behave(Manner {
            lies,
            ..Manner::default()
        });
    }

    pub(crate) fn heard(&self) -> Heard {
        std::mem::take(&mut *self.heard.lock().unwrap())
    }

    /// The buyer says yes, at the gateway.
    pub(crate) fn approve(&self) -> String {
        let mut payment = self.payment.lock().unwrap();
        payment["status"] = "APPROVED".into();
        payment["id"].as_str().unwrap().to_owned()
    }

    /// Whether something of its one payment is reserved or taken.
    pub(crate) fn has(&self, what: &str) -> bool {
        let payment = self.payment.lock().unwrap();
        payment["purchase_units"][0]["payments"][what].is_array()
    }

    fn finish(&self, status: StatusCode, mut body: Value) -> Response {
        let manner = self.manner.lock().unwrap().clone();
        if let Some((status, text)) = manner.answer {
            return (StatusCode::from_u16(status).unwrap(), text).into_response();
        }
        if manner.dies {
            let half = [Ok("{\"id\": \"pi_"), Err(io::Error::other("dead"))];
            return Body::from_stream(stream::iter(half)).into_response();
        }
        for (pointer, value) in manner.lies {
            if let Some(member) = body.pointer_mut(pointer) {
                *member = value;
            }
        }
        (status, Json(body)).into_response()
    }
}

async fn serve(router: Router) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    url
}

/// Stripe, as far as one payment needs it.
async fn stripe_says(
    State(played): State<Played>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let body = String::from_utf8(body.to_vec()).unwrap();
    let header = |name: &str| {
        headers
            .get(name)
            .map_or("", |value| value.to_str().unwrap())
    };
    assert_eq!(header("authorization"), "Bearer sk_test_of_the_tests");
    let slow = played.manner.lock().unwrap().slow;
    tokio::time::sleep(slow).await;
    let (key, path) = (header("idempotency-key").to_owned(), uri.path());
    let asked = format!("{method} {path}");
    played
        .heard
        .lock()
        .unwrap()
        .push((asked, key.clone(), body.clone()));
    let form: HashMap<String, String> = reqwest::Url::parse(&format!("http://x/?{body}"))
        .unwrap()
        .query_pairs()
        .map(|(name, value)| (name.into_owned(), value.into_owned()))
        .collect();
    if method == Method::POST {
        assert!(!key.is_empty(), "{path} without a key");
        if let Some(told) = played.told.lock().unwrap().get(&key) {
            return played.finish(StatusCode::OK, told.clone());
        }
    }
    let mut intent = played.payment.lock().unwrap();
    let amount = |name: &str| form[name].parse::<i64>().unwrap();
    match path.rsplit('/').next().unwrap() {
        "payment_intents" => {
            // Their names count; only the last one is kept.
            let last = intent["id"].as_str().map_or("0", |id| &id["pi_".len()..]);
            let id = format!("pi_{}", last.parse::<u32>().unwrap() + 1);
            *intent = json!({
                "id": id, "object": "payment_intent", "amount": amount("amount"),
                "currency": form["currency"], "status": "requires_payment_method",
                "capture_method": form["capture_method"], "client_secret": "pi_1_secret_2",
                "metadata": { "stockade_payment": form["metadata[stockade_payment]"] },
                "last_payment_error": null, "amount_received": 0, "latest_charge": null,
            });
        }
        "confirm" => match form["payment_method"].as_str() {
            "pm_card_visa" => {
                intent["status"] = "requires_capture".into();
                intent["amount_capturable"] = intent["amount"].clone();
            }
            "pm_card_3ds" => {
                intent["status"] = "requires_action".into();
                intent["next_action"] =
                    json!({ "redirect_to_url": { "url": "https://bank.example/3ds" } });
            }
            "pm_card_chargeDeclinedInsufficientFunds" => {
                let mut error = json!({ "type": "card_error", "code": "card_declined",
                    "decline_code": "insufficient_funds", "message": "Too little." });
                intent["last_payment_error"] = error.clone();
                error["payment_intent"] = intent.clone();
                return played.finish(StatusCode::PAYMENT_REQUIRED, json!({ "error": error }));
            }
            other => {
                let error = json!({ "error": { "type": "invalid_request_error",
                    "code": "resource_missing", "message": format!("No such PaymentMethod: {other}") } });
                return played.finish(StatusCode::BAD_REQUEST, error);
            }
        },
        "capture" => {
            intent["status"] = "succeeded".into();
            intent["amount_received"] = amount("amount_to_capture").into();
            intent["latest_charge"] = json!({ "id": "ch_1", "amount_refunded": 0 });
        }
        "cancel" if intent["status"] == "succeeded" => {
            let error = json!({ "error": { "type": "invalid_request_error",
                "code": "payment_intent_unexpected_state", "message": "Too late." } });
            return played.finish(StatusCode::BAD_REQUEST, error);
        }
        "cancel" => intent["status"] = "canceled".into(),
        "refunds" => {
            let before = intent["latest_charge"]["amount_refunded"].as_i64().unwrap();
            intent["latest_charge"]["amount_refunded"] = (before + amount("amount")).into();
            let refund = json!({ "id": "re_1", "object": "refund", "amount": amount("amount"),
                "currency": intent["currency"], "payment_intent": form["payment_intent"],
                "status": "succeeded" });
            played.told.lock().unwrap().insert(key, refund.clone());
            return played.finish(StatusCode::OK, refund);
        }
        _ => assert_eq!(method, Method::GET, "{path}"),
    }
    if method == Method::POST {
        played.told.lock().unwrap().insert(key, intent.clone());
    }
    played.finish(StatusCode::OK, intent.clone())
}

fn stripe_at(url: String) -> Stripe {
    Stripe::new(StripeSettings {
        url,
        secret_key: "sk_test_of_the_tests".into(),
        webhook_secrets: vec![WEBHOOK_SECRET.into(), "whsec_old".into()],
        return_url: None,
    })
    .unwrap()
}

/// A played Stripe, and where it is.
pub(crate) async fn played_stripe() -> (Played, String) {
    let played = Played::default();
    let router = Router::new()
        .route("/v1/{*path}", any(stripe_says))
        .with_state(played.clone());
    let url = serve(router).await;
    (played, url)
}

async fn stripe() -> (Played, Stripe) {
    let (played, url) = played_stripe().await;
    (played, stripe_at(url))
}

fn charge(method: &str) -> Charge {
    Charge {
        id: PaymentId(clock::new_id()),
        reference: None,
        money: Money::new(1999, Currency::parse("EUR").unwrap()).unwrap(),
        method: method.to_owned(),
        tries: 0,
    }
}

/// A charge that the gateway knows of.
async fn opened(gateway: &impl Gateway, method: &str) -> Charge {
    let mut charge = charge(method);
    charge.reference = Some(gateway.open(&charge).await.unwrap());
    charge
}

fn captured(amount: i64, refunded: i64) -> Found {
    Seen::Captured { amount, refunded }.into()
}

#[tokio::test]
async fn a_payment_over_stripe_from_beginning_to_end() {
    let (played, stripe) = stripe().await;
    let charge = opened(&stripe, "pm_card_visa").await;
    assert_eq!(stripe.look(&charge).await, Ok(Seen::Open.into()));
    assert_eq!(stripe.authorise(&charge).await, Ok(Seen::Authorised.into()));
    assert_eq!(stripe.capture(&charge, 1500).await, Ok(captured(1500, 0)));
    let refund = Refund {
        key: "r-1".to_owned(),
        amount: 500,
    };
    for _ in 0..3 {
        assert_eq!(stripe.refund(&charge, &refund).await, Ok(()));
    }
    assert_eq!(
        stripe.look(&charge).await,
        Ok(captured(1500, 500)),
        "refunded once"
    );
    // What is taken cannot be let go.
    assert!(matches!(
        stripe.void(&charge).await,
        Err(Trouble::Refused(_))
    ));

    let heard = played.heard();
    let (_, key, body) = &heard[0];
    assert_eq!(*key, format!("stockade-{}-open-0", charge.id));
    for part in ["amount=1999", "currency=eur", "capture_method=manual"] {
        assert!(body.contains(part), "{body}");
    }
    let captures: Vec<_> = heard
        .iter()
        .filter(|(asked, ..)| asked.ends_with("/capture"))
        .collect();
    assert!(captures[0].2.contains("amount_to_capture=1500"));
    assert_eq!(captures[0].1, format!("stockade-{}-capture-0", charge.id));
}

#[tokio::test]
async fn stripe_says_why_not_and_what_the_buyer_has_to_do() {
    let (_, stripe) = stripe().await;
    let charge = opened(&stripe, "pm_card_chargeDeclinedInsufficientFunds").await;
    let declined = Ok(Seen::Declined(Decline::InsufficientFunds).into());
    assert_eq!(stripe.authorise(&charge).await, declined);
    assert_eq!(stripe.look(&charge).await, declined);
    assert_eq!(stripe.void(&charge).await, Ok(Seen::Voided.into()));

    let (_, stripe) = self::stripe().await;
    let charge = opened(&stripe, "pm_card_3ds").await;
    let action = Action {
        redirect_url: Some("https://bank.example/3ds".to_owned()),
        client_secret: Some("pi_1_secret_2".to_owned()),
    };
    let found = stripe.authorise(&charge).await.unwrap();
    assert_eq!(
        (found.seen, found.action),
        (Seen::RequiresAction, Some(action))
    );

    let (_, stripe) = self::stripe().await;
    let charge = opened(&stripe, "pm_of_nobody").await;
    let refused = stripe.authorise(&charge).await;
    assert!(matches!(refused, Err(Trouble::Refused(_))), "{refused:?}");
}

#[tokio::test]
async fn a_stripe_that_lies_is_not_believed() {
    let (played, stripe) = stripe().await;
    let charge = opened(&stripe, "pm_card_visa").await;
    for (pointer, value) in [
        ("/amount", json!(1)),
        ("/currency", json!("usd")),
        ("/id", json!("pi_2")),
        ("/id", json!("../../v1/payouts")),
        ("/metadata/stockade_payment", json!(clock::new_id())),
        ("/metadata", json!({})),
    ] {
        played.lie(pointer, value.clone());
        for answer in [stripe.look(&charge).await, stripe.authorise(&charge).await] {
            assert!(
                matches!(answer, Err(Trouble::Disagrees(_))),
                "{pointer} {value}: {answer:?}"
            );
        }
    }
    played.behave(Manner::default());
    stripe.authorise(&charge).await.unwrap();
    played.lie("/amount_capturable", json!(1));
    assert!(matches!(
        stripe.look(&charge).await,
        Err(Trouble::Disagrees(_))
    ));
    // A name that would lead elsewhere is no name.
    let (liar, lying) = self::stripe().await;
    liar.lie("/id", json!("pi_1/../../payouts"));
    let refused = lying.open(&self::charge("pm_card_visa")).await;
    assert!(matches!(refused, Err(Trouble::Disagrees(_))), "{refused:?}");
    played.behave(Manner::default());
    stripe.capture(&charge, 1999).await.unwrap();
    for (pointer, value) in [
        ("/amount", json!(1)),
        ("/currency", json!("usd")),
        ("/payment_intent", json!("pi_2")),
    ] {
        played.lie(pointer, value);
        let refund = Refund {
            key: format!("r{pointer}"),
            amount: 5,
        };
        let refunded = stripe.refund(&charge, &refund).await;
        assert!(
            matches!(refunded, Err(Trouble::Disagrees(_))),
            "{refunded:?}"
        );
    }
}

/// A server that reads a request and then does this with its connection.
async fn rude(answer: &'static [u8], stay: bool) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let mut kept = Vec::new();
        loop {
            let (mut socket, _) = listener.accept().await.unwrap();
            let _ = socket.read(&mut [0; 8192]).await;
            let _ = socket.write_all(answer).await;
            if stay {
                kept.push(socket);
            }
        }
    });
    url
}

#[tokio::test]
async fn what_does_not_answer_may_have_happened() {
    for (name, answer) in [
        ("closes at once", &b""[..]),
        ("no HTTP", b"hello\r\n\r\n"),
        ("dies in the head", b"HTTP/1.1 200 OK\r\nContent-Le"),
        (
            "dies in the body",
            b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{\"id\": \"pi_1\"",
        ),
        (
            "an empty body",
            b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        ),
        (
            "no JSON",
            b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>",
        ),
        (
            "another place",
            b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
        ),
        (
            "an error inside",
            b"HTTP/1.1 500 Oops\r\nContent-Length: 2\r\n\r\n{}",
        ),
        (
            "overloaded",
            b"HTTP/1.1 503 Oops\r\nContent-Length: 2\r\n\r\n{}",
        ),
        (
            "busy with the same",
            b"HTTP/1.1 409 Conflict\r\nContent-Length: 2\r\n\r\n{}",
        ),
    ] {
        let stripe = stripe_at(rude(answer, false).await);
        let mut charge = charge("pm_card_visa");
        charge.reference = Some("pi_1".to_owned());
        let answer = stripe.capture(&charge, 1999).await;
        assert!(
            matches!(answer, Err(Trouble::Unknown(_))),
            "{name}: {answer:?}"
        );
    }
    // What was never sent has not.
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", nobody.local_addr().unwrap());
    drop(nobody);
    let answer = stripe_at(url).open(&charge("pm_card_visa")).await;
    assert!(
        matches!(answer, Err(Trouble::Unavailable { .. })),
        "{answer:?}"
    );
    for (status, after) in [("429 Slow", 7), ("401 No", 2)] {
        let text = format!("HTTP/1.1 {status}\r\nRetry-After: 7\r\nContent-Length: 2\r\n\r\n{{}}");
        let url = rude(Box::leak(text.into_boxed_str()).as_bytes(), false).await;
        let answer = stripe_at(url).open(&charge("pm_card_visa")).await;
        match answer {
            Err(Trouble::Unavailable { after: wait, .. }) => {
                assert_eq!(wait, Duration::from_secs(after));
            }
            other => panic!("{status}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn a_gateway_that_hangs_is_given_up() {
    let stripe = stripe_at(rude(b"HTTP/1.1 200 OK\r\n", true).await);
    let answer = stripe.open(&charge("pm_card_visa")).await;
    assert!(matches!(answer, Err(Trouble::Unknown(_))), "{answer:?}");
}

#[tokio::test]
async fn an_answer_without_an_end_is_cut_off() {
    let head = "HTTP/1.1 200 OK\r\nContent-Length: 9000000\r\n\r\n";
    let text = format!("{head}{}", " ".repeat(9_000_000));
    let url = rude(Box::leak(text.into_boxed_str()).as_bytes(), true).await;
    let answer = stripe_at(url).open(&charge("pm_card_visa")).await;
    assert!(matches!(answer, Err(Trouble::Unknown(_))), "{answer:?}");
}

#[tokio::test]
async fn webhooks_of_stripe_are_read_once_they_are_verified() {
    let stripe = stripe_at("https://stripe.invalid".to_owned());
    let now = 1_764_000_000;
    let headers = |secret: &str, body: &[u8]| {
        let mut headers = HeaderMap::new();
        let header = sign(&secret.into(), body, now);
        headers.insert("stripe-signature", header.parse().unwrap());
        headers
    };
    for (body, reference) in [
        (
            json!({ "id": "evt_1", "type": "payment_intent.succeeded",
                    "data": { "object": { "object": "payment_intent", "id": "pi_1" } } }),
            Some("pi_1"),
        ),
        (
            json!({ "id": "evt_2", "type": "charge.refunded",
                    "data": { "object": { "object": "charge", "id": "ch_1", "payment_intent": "pi_1" } } }),
            Some("pi_1"),
        ),
        (json!({ "id": "evt_3", "type": "balance.available" }), None),
    ] {
        let body = body.to_string().into_bytes();
        for secret in [WEBHOOK_SECRET, "whsec_old"] {
            let notice = stripe
                .webhook(&headers(secret, &body), &body, now)
                .await
                .unwrap();
            assert_eq!(notice.reference.as_deref(), reference);
        }
        for (secret, later) in [("whsec_other", 0), (WEBHOOK_SECRET, 301)] {
            let refused = stripe
                .webhook(&headers(secret, &body), &body, now + later)
                .await;
            assert!(matches!(refused, Err(Unverified::Forged(_))));
        }
        let refused = stripe.webhook(&HeaderMap::new(), &body, now).await;
        assert!(matches!(refused, Err(Unverified::Forged(_))));
    }
    for body in [&b"{"[..], b"{}", b"[]", b"\xff"] {
        let refused = stripe
            .webhook(&headers(WEBHOOK_SECRET, body), body, now)
            .await;
        assert!(
            matches!(refused, Err(Unverified::Unreadable(_))),
            "{refused:?}"
        );
    }
}

/// `PayPal`, as far as one payment needs it.
async fn paypal_says(
    State(played): State<Played>,
    method: Method,
    Path(path): Path<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let header = |name: &str| {
        headers
            .get(name)
            .map_or("", |value| value.to_str().unwrap())
    };
    let key = header("paypal-request-id").to_owned();
    let text = String::from_utf8(body.to_vec()).unwrap();
    played
        .heard
        .lock()
        .unwrap()
        .push((format!("{method} {path}"), key.clone(), text.clone()));
    if path == "v1/oauth2/token" {
        assert!(header("authorization").starts_with("Basic "));
        return Json(json!({ "access_token": "A-1", "expires_in": 3600 })).into_response();
    }
    assert_eq!(header("authorization"), "Bearer A-1");
    let body: Value = serde_json::from_str(&text).unwrap_or_default();
    if path == "v1/notifications/verify-webhook-signature" {
        let genuine = body["transmission_sig"] == "genuine"
            && body["webhook_id"] == "WH-1"
            // Byte by byte as it was sent.
            && text.contains("\"webhook_event\":{ \"id\" : \"WH-EVT-");
        let status = if genuine { "SUCCESS" } else { "FAILURE" };
        return Json(json!({ "verification_status": status })).into_response();
    }
    let mut order = played.payment.lock().unwrap();
    let payments = "/purchase_units/0/payments";
    match path.rsplit('/').next().unwrap() {
        "orders" => {
            // Their names count; only the last one is kept.
            let last = order["id"].as_str().map_or("0", |id| &id["ORDER".len()..]);
            let id = format!("ORDER{}", last.parse::<u32>().unwrap() + 1);
            *order = body.clone();
            order["id"] = id.into();
            order["status"] = "CREATED".into();
            order["links"] =
                json!([{ "rel": "approve", "href": "https://paypal.example/approve" }]);
            order["purchase_units"][0]["payments"] = json!({});
        }
        "authorize" => {
            let amount = order["purchase_units"][0]["amount"].clone();
            order["status"] = "COMPLETED".into();
            *order.pointer_mut(payments).unwrap() = json!({ "authorizations": [
                { "id": "AUTH1", "status": "CREATED", "amount": amount }] });
        }
        "capture" => {
            assert_eq!(path, "v2/payments/authorizations/AUTH1/capture");
            order.pointer_mut(payments).unwrap()["captures"] =
                json!([{ "id": "CAP1", "status": "COMPLETED", "amount": body["amount"] }]);
        }
        "void" => {
            order.pointer_mut(payments).unwrap()["authorizations"][0]["status"] = "VOIDED".into();
            return StatusCode::NO_CONTENT.into_response();
        }
        "refund" => {
            assert_eq!(path, "v2/payments/captures/CAP1/refund");
            let refund = json!({ "id": key, "status": "COMPLETED", "amount": body["amount"] });
            let list = &mut order.pointer_mut(payments).unwrap()["refunds"];
            let mut refunds = list.as_array().cloned().unwrap_or_default();
            if !refunds.contains(&refund) {
                refunds.push(refund.clone());
            }
            *list = refunds.into();
            return played.finish(StatusCode::CREATED, refund);
        }
        _ => assert_eq!(method, Method::GET, "{path}"),
    }
    played.finish(StatusCode::OK, order.clone())
}

/// A played `PayPal`, and where it is.
pub(crate) async fn played_paypal() -> (Played, String) {
    let played = Played::default();
    let router = Router::new()
        .route("/{*path}", any(paypal_says))
        .with_state(played.clone());
    let url = serve(router).await;
    (played, url)
}

async fn paypal() -> (Played, Paypal) {
    let (played, url) = played_paypal().await;
    let paypal = Paypal::new(PaypalSettings {
        url,
        client_id: "client".to_owned(),
        client_secret: "secret".into(),
        webhook_id: "WH-1".to_owned(),
        return_url: None,
    });
    (played, paypal.unwrap())
}

/// What `PayPal` sends when the buyer has said yes to an order, or what somebody else sends.
pub(crate) fn approval(event: &str, order: &str, signature: &str) -> (HeaderMap, String) {
    let body = format!(
        r#"{{ "id" : "WH-EVT-{event}", "event_type":"CHECKOUT.ORDER.APPROVED",
              "resource": {{ "id": "{order}" }} }}"#
    );
    let mut headers = HeaderMap::new();
    for (name, value) in [
        ("auth-algo", "x"),
        ("cert-url", "x"),
        ("transmission-id", "x"),
        ("transmission-time", "x"),
        ("transmission-sig", signature),
    ] {
        let name = HeaderName::try_from(format!("paypal-{name}")).unwrap();
        headers.insert(name, value.parse().unwrap());
    }
    (headers, body)
}

#[tokio::test]
async fn a_payment_over_paypal_from_beginning_to_end() {
    let (played, paypal) = paypal().await;
    let charge = opened(&paypal, "paypal").await;
    let found = paypal.authorise(&charge).await.unwrap();
    assert_eq!(found.seen, Seen::RequiresAction);
    let url = found.action.unwrap().redirect_url;
    assert_eq!(url.as_deref(), Some("https://paypal.example/approve"));
    played.approve();
    assert_eq!(paypal.look(&charge).await, Ok(Seen::Open.into()));
    assert_eq!(paypal.authorise(&charge).await, Ok(Seen::Authorised.into()));
    assert_eq!(paypal.capture(&charge, 1500).await, Ok(captured(1500, 0)));
    for key in ["r-1", "r-1", "r-2"] {
        let refund = Refund {
            key: key.to_owned(),
            amount: 250,
        };
        assert_eq!(paypal.refund(&charge, &refund).await, Ok(()));
    }
    assert_eq!(paypal.look(&charge).await, Ok(captured(1500, 500)));
    let heard = played.heard();
    let tokens = heard
        .iter()
        .filter(|(asked, ..)| asked.ends_with("token"))
        .count();
    assert_eq!(tokens, 1, "the token is used again");
    let open = heard
        .iter()
        .find(|(asked, ..)| asked.ends_with("orders"))
        .unwrap();
    let body: Value = serde_json::from_str(&open.2).unwrap();
    assert_eq!(body["intent"], "AUTHORIZE");
    assert_eq!(body["purchase_units"][0]["amount"]["value"], "19.99");
    assert_eq!(open.1, format!("stockade-{}-open-0", charge.id));
}

#[tokio::test]
async fn a_paypal_order_is_let_go_at_every_point_and_no_lie_is_believed() {
    let (played, paypal) = paypal().await;
    let charge = opened(&paypal, "paypal").await;
    assert_eq!(paypal.void(&charge).await, Ok(Seen::Voided.into()));
    played.approve();
    paypal.authorise(&charge).await.unwrap();
    for (pointer, value) in [
        ("/id", json!("ORDER2")),
        ("/purchase_units/0/amount/value", json!("19.98")),
        ("/purchase_units/0/amount/currency_code", json!("USD")),
        ("/purchase_units/0/custom_id", json!("another")),
        (
            "/purchase_units/0/payments/authorizations/0/amount/value",
            json!("0.01"),
        ),
    ] {
        played.lie(pointer, value);
        let found = paypal.look(&charge).await;
        assert!(
            matches!(found, Err(Trouble::Disagrees(_))),
            "{pointer}: {found:?}"
        );
    }
    played.behave(Manner::default());
    assert_eq!(paypal.void(&charge).await, Ok(Seen::Voided.into()));
    played.behave(Manner {
        answer: Some((500, "oops")),
        ..Manner::default()
    });
    assert!(matches!(
        paypal.look(&charge).await,
        Err(Trouble::Unknown(_))
    ));
}

#[tokio::test]
async fn webhooks_of_paypal_are_what_paypal_says_it_has_sent() {
    let (_, paypal) = paypal().await;
    let body = br#"{ "id" : "WH-EVT-1", "event_type":"PAYMENT.AUTHORIZATION.CREATED",
        "resource": { "supplementary_data": { "related_ids": { "order_id": "ORDER1" } } } }"#;
    let (mut headers, _) = approval("1", "ORDER1", "genuine");
    headers.remove("paypal-transmission-sig");
    let refused = paypal.webhook(&headers, body, 0).await;
    assert!(matches!(refused, Err(Unverified::Forged(_))));
    headers.insert("paypal-transmission-sig", "forged".parse().unwrap());
    let refused = paypal.webhook(&headers, body, 0).await;
    assert!(matches!(refused, Err(Unverified::Forged(_))));
    headers.insert("paypal-transmission-sig", "genuine".parse().unwrap());
    let notice = paypal.webhook(&headers, body, 0).await.unwrap();
    assert_eq!(notice.id, "WH-EVT-1");
    assert_eq!(notice.reference.as_deref(), Some("ORDER1"));
}
