//! What buyers and operators may rely on, with a crowd over HTTP and every real part.

use std::{
    collections::{BTreeSet, HashSet},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use chrono::TimeDelta;
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use sqlx::Row;
use stockade::{auth::Role, clock};
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};
use uuid::Uuid;

use super::support::app::{Answer, App, PATIENCE, crowd, id, send, sql};

/// An order as PostgreSQL has it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct OrderRow {
    pub(crate) seq: i64,
    pub(crate) id: Uuid,
    pub(crate) buyer: Uuid,
    pub(crate) quantity: i64,
    pub(crate) status: String,
}

impl OrderRow {
    /// What a 201 says.
    pub(crate) fn of(body: &Value) -> Self {
        Self {
            seq: body["seq"].as_i64().unwrap(),
            id: uuid(&body["id"]),
            buyer: uuid(&body["buyer_id"]),
            quantity: body["quantity"].as_i64().unwrap(),
            status: body["status"].as_str().unwrap().to_owned(),
        }
    }
}

pub(crate) fn uuid(value: &Value) -> Uuid {
    value.as_str().unwrap().parse().unwrap()
}

/// The orders of a sale, in order of acceptance, once everything is stored and the audit passes.
pub(crate) async fn stored(app: &App, sale: &str) -> Vec<OrderRow> {
    let audit = app.audit(sale).await;
    assert_eq!(audit["verdict"], "pass", "{audit:#}");
    rows(app, sale).await
}

/// The orders of a sale that PostgreSQL has by now, in order of acceptance.
pub(crate) async fn rows(app: &App, sale: &str) -> Vec<OrderRow> {
    let rows = sqlx::query(
        "SELECT seq, id, buyer_id, quantity, status FROM orders WHERE sale_id = $1
         ORDER BY epoch, seq",
    )
    .bind(sale.parse::<Uuid>().unwrap())
    .fetch_all(&mut sql(app).await)
    .await
    .unwrap();
    rows.iter()
        .map(|row| OrderRow {
            seq: row.get("seq"),
            id: row.get("id"),
            buyer: row.get("buyer_id"),
            quantity: row.get("quantity"),
            status: row.get("status"),
        })
        .collect()
}

/// The bodies of the acceptances among answers, in order of acceptance.
pub(crate) fn acceptances(answers: &[Answer]) -> Vec<Value> {
    let accepted = answers.iter().filter(|answer| answer.status == 201);
    let mut bodies: Vec<_> = accepted.map(Answer::json).collect();
    bodies.sort_by_key(|body| body["seq"].as_u64());
    bodies
}

/// Purchases of one unit by so many new buyers.
pub(crate) fn strangers(app: &App, sale: &str, count: usize) -> Vec<RequestBuilder> {
    (0..count)
        .map(|_| app.purchase(sale, clock::new_id(), "k", r#"{"quantity":1}"#))
        .collect()
}

/// The refusal with this code.
#[track_caller]
pub(crate) fn refused(answer: &Answer, status: u16, code: &str) -> Value {
    let problem = answer.json();
    assert_eq!(
        (answer.status.as_u16(), &problem["code"]),
        (status, &json!(code)),
        "{answer:?}"
    );
    problem
}

/// A replay: the first answer's bytes, and a header that says so.
#[track_caller]
pub(crate) fn assert_replays(again: &Answer, first: &Answer) {
    assert_eq!(again.status, 201, "{again:?}");
    assert_eq!(again.header("idempotency-replayed"), Some("true"));
    assert_eq!(again.text, first.text);
    assert_eq!(again.header("location"), first.header("location"));
}

async fn leaderboard(app: &App, sale: &str) -> Vec<Value> {
    app.pages(&format!("/v1/sales/{sale}/leaderboard")).await
}

pub(crate) async fn steer(app: &App, sale: &str, what: &str) -> Answer {
    send(app.operate(Method::POST, &format!("/v1/sales/{sale}/{what}"))).await
}

pub(crate) fn restock(app: &App, sale: &str, units: u64, key: &str) -> RequestBuilder {
    app.operate(Method::POST, &format!("/v1/sales/{sale}/restock"))
        .header("Idempotency-Key", key)
        .json(&json!({ "units": units }))
}

/// A request of a buyer about an order.
pub(crate) fn ask(app: &App, method: Method, buyer: Uuid, path: &str) -> RequestBuilder {
    app.request(method, path)
        .bearer_auth(app.token(buyer, Role::Buyer))
}

pub(crate) async fn cancel(app: &App, buyer: Uuid, order: &str) -> Answer {
    let path = format!("/v1/orders/{order}/cancel");
    send(ask(app, Method::POST, buyer, &path)).await
}

#[track_caller]
fn assert_counters(sale: &Value, allocation: u64, remaining: u64, sold: u64, seq: u64) {
    let expected = json!({
        "allocation": allocation, "remaining": remaining, "held": 0, "sold": sold, "seq": seq,
        "sold_out": remaining == 0,
    });
    for (name, value) in expected.as_object().unwrap() {
        assert_eq!(&sale[name], value, "{name} of {sale}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crowd_gets_exactly_the_stock() {
    let app = App::start().await;
    let sale = app
        .sale(json!({ "allocation": 20, "per_buyer_limit": 1 }))
        .await;
    let sale = id(&sale);
    let answers = crowd(strangers(&app, sale, 300)).await;

    let accepted = acceptances(&answers);
    for answer in answers.iter().filter(|answer| answer.status != 201) {
        let problem = refused(answer, 409, "sold_out");
        assert_eq!(problem["outcome"], "not_applied");
    }
    let seqs: Vec<_> = accepted.iter().map(|body| body["seq"].as_u64()).collect();
    assert_eq!(seqs, (1..=20).map(Some).collect::<Vec<_>>());
    let ids: HashSet<_> = accepted.iter().map(id).collect();
    assert_eq!(ids.len(), 20);
    assert!(accepted.is_sorted_by_key(|body| body["accepted_at"].as_str()));
    for body in &accepted {
        assert_eq!(
            (&body["sale_id"], &body["round"], &body["quantity"]),
            (&json!(sale), &json!(1), &json!(1))
        );
        assert_eq!(body["total"], json!({"amount": 1999, "currency": "EUR"}));
        assert_eq!(body["status"], "confirmed");
    }
    assert_counters(&app.view(sale).await, 20, 0, 20, 20);

    let board = leaderboard(&app, sale).await;
    for (rank, (place, body)) in (1..).zip(board.iter().zip(&accepted)) {
        assert_eq!(place["rank"], rank);
        for member in ["seq", "quantity", "accepted_at"] {
            assert_eq!(place[member], body[member], "{member}");
        }
        assert!(
            !place
                .to_string()
                .contains(body["buyer_id"].as_str().unwrap())
        );
    }
    let pseudonyms: HashSet<_> = board.iter().map(|place| place["buyer"].as_str()).collect();
    assert_eq!((board.len(), pseudonyms.len()), (20, 20));

    let expected: Vec<_> = accepted.iter().map(OrderRow::of).collect();
    assert_eq!(stored(&app, sale).await, expected);
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_key_sent_sixty_four_times_at_once_has_one_effect() {
    let app = App::start().await;
    let sale = app
        .sale(json!({ "allocation": 100, "per_buyer_limit": 100 }))
        .await;
    let sale = id(&sale);
    let buyer = clock::new_id();
    let same = (0..64).map(|_| app.purchase(sale, buyer, "k", r#"{"quantity":2}"#));
    let answers = crowd(same).await;
    let replays = |answer: &&Answer| answer.header("idempotency-replayed") == Some("true");
    assert_eq!(answers.iter().filter(replays).count(), 63);
    for answer in &answers {
        assert_eq!(answer.status, 201, "{answer:?}");
        assert_eq!(answer.text, answers[0].text);
        assert_eq!(answer.header("location"), answers[0].header("location"));
    }
    assert_counters(&app.view(sale).await, 100, 98, 2, 1);

    // The key belongs to its request, and to its buyer.
    let other = app.buy(sale, buyer, "k", 1).await;
    refused(&other, 422, "idempotency_key_mismatch");
    assert_counters(&app.view(sale).await, 100, 98, 2, 1);
    let stranger = app.buy(sale, clock::new_id(), "k", 1).await.expect(201);
    assert_eq!(stranger.header("idempotency-replayed"), None);
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retry_gets_its_201_whatever_has_happened_since() {
    let mut app = App::start().await;
    let sale = app
        .sale(json!({ "allocation": 3, "per_buyer_limit": 2 }))
        .await;
    let sale = id(&sale).to_owned();
    let [ada, bob] = [clock::new_id(), clock::new_id()];
    let first = app.buy(&sale, ada, "k", 2).await.expect(201);
    let retried = async |app: &App| {
        assert_replays(&app.buy(&sale, ada, "k", 2).await, &first);
        let changed = app.buy(&sale, ada, "k", 1).await;
        refused(&changed, 422, "idempotency_key_mismatch");
    };
    retried(&app).await;

    let other = app.buy(&sale, bob, "k", 1).await.expect(201);
    let sold_out = app.buy(&sale, clock::new_id(), "k", 1).await;
    refused(&sold_out, 409, "sold_out");
    retried(&app).await;
    cancel(&app, ada, id(&first.json())).await.expect(200);
    retried(&app).await;
    steer(&app, &sale, "pause").await.expect(200);
    refused(&app.buy(&sale, ada, "new", 1).await, 409, "paused");
    retried(&app).await;

    app.stop().await;
    app.run().await;
    retried(&app).await;
    app.redis.server.kill().await;
    app.redis.server.restart().await.unwrap();
    let back = async {
        while app.buy(&sale, ada, "k", 2).await.status != 201 {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, back).await.unwrap();
    retried(&app).await;

    steer(&app, &sale, "resume").await.expect(200);
    steer(&app, &sale, "close").await.expect(200);
    refused(&app.buy(&sale, ada, "new", 1).await, 409, "closed");
    retried(&app).await;
    assert_replays(&app.buy(&sale, bob, "k", 1).await, &other);
    assert_eq!(stored(&app, &sale).await.len(), 2);
    app.finish().await;
}

#[tokio::test]
async fn buying_and_cancelling_in_a_loop_comes_to_an_end() {
    let app = App::start().await;
    let sale = app
        .sale(json!({ "allocation": 50, "per_buyer_limit": 2 }))
        .await;
    let sale = id(&sale);
    let buyer = clock::new_id();
    for key in 0..10 {
        let order = app.buy(sale, buyer, &key.to_string(), 1).await.expect(201);
        cancel(&app, buyer, id(&order.json())).await.expect(200);
    }
    let refusal = app.buy(sale, buyer, "one-more", 1).await;
    let problem = refused(&refusal, 409, "buyer_limit");
    assert_eq!(
        (&problem["limit"], &problem["held"], &problem["retry"]),
        (&json!(2), &json!(0), &json!("never"))
    );
    assert_counters(&app.view(sale).await, 50, 50, 0, 20);
    app.buy(sale, clock::new_id(), "k", 1).await.expect(201);
    app.finish().await;
}

#[tokio::test]
async fn quantities_and_limits_are_counted_in_units() {
    let app = App::start().await;
    let terms = json!({ "allocation": 7, "per_buyer_limit": 5, "per_order_limit": 3 });
    let sale = app.sale(terms).await;
    assert_eq!(
        (&sale["per_buyer_limit"], &sale["per_order_limit"]),
        (&json!(5), &json!(3))
    );
    let sale = id(&sale);
    let [ada, bob] = [clock::new_id(), clock::new_id()];
    let problem = refused(&app.buy(sale, ada, "a", 4).await, 422, "order_limit");
    assert_eq!(
        (&problem["limit"], &problem["held"], &problem["outcome"]),
        (&json!(3), &json!(0), &json!("not_applied"))
    );
    // A refusal leaves nothing behind: the same key may ask for something else.
    let order = app.buy(sale, ada, "a", 3).await.expect(201).json();
    assert_eq!(order["total"], json!({"amount": 5997, "currency": "EUR"}));
    let problem = refused(&app.buy(sale, ada, "b", 3).await, 409, "buyer_limit");
    assert_eq!(
        (&problem["limit"], &problem["held"]),
        (&json!(5), &json!(3))
    );
    app.buy(sale, ada, "b", 2).await.expect(201);
    let problem = refused(&app.buy(sale, bob, "a", 3).await, 409, "insufficient");
    assert_eq!(problem["remaining"], 2);
    app.buy(sale, bob, "a", 2).await.expect(201);
    // In this order: the order's limit, the buyer's, the stock.
    refused(&app.buy(sale, ada, "c", 4).await, 422, "order_limit");
    refused(&app.buy(sale, ada, "c", 1).await, 409, "buyer_limit");
    refused(&app.buy(sale, bob, "c", 1).await, 409, "sold_out");
    assert_counters(&app.view(sale).await, 7, 0, 7, 3);
    app.finish().await;
}

#[tokio::test]
async fn a_cancelled_order_gives_its_units_and_its_place_back_once() {
    let app = App::start().await;
    let sale = app
        .sale(json!({ "allocation": 4, "per_buyer_limit": 2 }))
        .await;
    let sale = id(&sale);
    let [ada, bob, eve] = [clock::new_id(), clock::new_id(), clock::new_id()];
    let first = app.buy(sale, ada, "k", 2).await.expect(201).json();
    let second = app.buy(sale, bob, "k", 2).await.expect(201).json();
    let path = format!("/v1/orders/{}", id(&first));

    refused(&cancel(&app, eve, id(&first)).await, 404, "not_found");
    refused(
        &send(ask(&app, Method::GET, eve, &path)).await,
        404,
        "not_found",
    );
    assert_counters(&app.view(sale).await, 4, 0, 4, 2);

    let many = (0..16).map(|_| ask(&app, Method::POST, ada, &format!("{path}/cancel")));
    for answer in crowd(many).await {
        let order = answer.expect(200).json();
        assert_eq!(
            (&order["status"], &order["id"], &order["seq"]),
            (&json!("cancelled"), &first["id"], &json!(1))
        );
    }
    assert_counters(&app.view(sale).await, 4, 2, 2, 3);
    let order = send(ask(&app, Method::GET, ada, &path)).await.expect(200);
    assert_eq!(order.json()["status"], "cancelled");
    let board = leaderboard(&app, sale).await;
    let places: Vec<_> = board
        .iter()
        .map(|place| (&place["rank"], &place["seq"]))
        .collect();
    assert_eq!(places, [(&json!(1), &json!(2))]);

    // Units, and the buyer's own limit, are free again.
    let again = app.buy(sale, ada, "k2", 2).await.expect(201).json();
    assert_eq!(again["seq"], 4);
    // An operator may give back what is not his.
    let path = format!("/v1/orders/{}/cancel", id(&second));
    send(app.operate(Method::POST, &path)).await.expect(200);
    app.buy(sale, eve, "k", 2).await.expect(201);
    assert_counters(&app.view(sale).await, 4, 0, 4, 6);
    let statuses: Vec<_> = stored(&app, sale)
        .await
        .into_iter()
        .map(|row| (row.seq, row.status))
        .collect();
    let expected = [
        (1, "cancelled"),
        (2, "cancelled"),
        (4, "confirmed"),
        (6, "confirmed"),
    ];
    assert_eq!(
        statuses,
        expected.map(|(seq, status)| (seq, status.to_owned()))
    );
    app.finish().await;
}

#[tokio::test]
async fn operators_pause_resume_restock_and_close_once() {
    let app = App::start().await;
    let sale = app
        .sale(json!({ "allocation": 2, "per_buyer_limit": 9 }))
        .await;
    let sale = id(&sale);
    let buyer = clock::new_id();
    let steered = async |what: &str, state: &str, seq: u64| {
        for _ in 0..2 {
            let answer = steer(&app, sale, what).await.expect(200).json();
            assert_eq!(
                (&answer["state"], &answer["seq"]),
                (&json!(state), &json!(seq))
            );
        }
    };
    app.buy(sale, buyer, "1", 1).await.expect(201);
    steered("pause", "paused", 2).await;
    let answer = app.buy(sale, buyer, "2", 1).await;
    assert_eq!(refused(&answer, 409, "paused")["outcome"], "not_applied");
    assert!(answer.header("retry-after").is_some());
    steered("resume", "open", 3).await;
    app.buy(sale, buyer, "2", 1).await.expect(201);
    refused(&app.buy(sale, buyer, "3", 1).await, 409, "sold_out");

    let answers = crowd((0..16).map(|_| restock(&app, sale, 5, "r"))).await;
    let replays = |answer: &&Answer| answer.header("idempotency-replayed") == Some("true");
    assert_eq!(answers.iter().filter(replays).count(), 15);
    for answer in answers {
        assert_counters(&answer.expect(200).json(), 7, 5, 2, 5);
    }
    app.buy(sale, buyer, "3", 1).await.expect(201);
    let other = send(restock(&app, sale, 6, "r")).await;
    refused(&other, 422, "idempotency_key_mismatch");
    let path = format!("/v1/sales/{sale}/restock");
    let keyless = app.operate(Method::POST, &path).json(&json!({"units": 1}));
    refused(&send(keyless).await, 400, "idempotency_key_missing");
    let much = send(restock(&app, sale, 10_000_000, "much")).await;
    refused(&much, 422, "validation");
    assert_counters(&app.view(sale).await, 7, 4, 3, 6);

    steered("close", "closed", 7).await;
    refused(&app.buy(sale, buyer, "4", 1).await, 409, "closed");
    for what in ["pause", "resume"] {
        refused(&steer(&app, sale, what).await, 409, "conflict");
    }
    refused(&send(restock(&app, sale, 1, "late")).await, 409, "conflict");
    let again = send(restock(&app, sale, 5, "r")).await.expect(200);
    assert_eq!(again.header("idempotency-replayed"), Some("true"));
    // What was bought may still be given back; it is not sold again.
    let orders = stored(&app, sale).await;
    cancel(&app, buyer, &orders[0].id.to_string())
        .await
        .expect(200);
    refused(&app.buy(sale, buyer, "4", 1).await, 409, "closed");
    assert_counters(&app.view(sale).await, 7, 5, 2, 8);
    app.finish().await;
}

/// What one buyer saw who asked again and again, with a new key each time.
#[derive(Default)]
struct Seen {
    /// Code of a refusal, or `201`; repetitions left out.
    turns: Vec<String>,
    accepted: Vec<(Uuid, Answer)>,
    /// How long it said that it takes until the sale opens.
    starts_in_ms: Vec<u64>,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_accepted_outside_the_window() {
    let app = App::start().await;
    let opens_at = clock::now() + TimeDelta::seconds(4);
    let closes_at = opens_at + TimeDelta::milliseconds(1_500);
    let sale = app
        .sale(json!({
            "allocation": 1_000_000, "per_buyer_limit": 1,
            "opens_at": opens_at, "closes_at": closes_at,
        }))
        .await;
    assert_eq!(sale["state"], "scheduled");
    let sale = id(&sale).to_owned();
    let view = app.view(&sale).await;
    let text = |member: &str| view[member].as_str().unwrap().to_owned();
    let (opens_at, closes_at) = (text("opens_at"), text("closes_at"));

    let app = Arc::new(app);
    let mut hammering = JoinSet::new();
    for _ in 0..16 {
        let (app, sale, opens_at) = (Arc::clone(&app), sale.clone(), opens_at.clone());
        hammering.spawn(async move {
            let mut seen = Seen::default();
            loop {
                let buyer = clock::new_id();
                let answer = app.buy(&sale, buyer, "k", 1).await;
                let body = answer.json();
                let turn = match answer.status.as_u16() {
                    201 => "201",
                    _ => body["code"].as_str().unwrap(),
                };
                if seen.turns.last().is_none_or(|last| last != turn) {
                    seen.turns.push(turn.to_owned());
                }
                if let Some(starts_in_ms) = body["starts_in_ms"].as_u64() {
                    seen.starts_in_ms.push(starts_in_ms);
                    // Long before the start there is nothing to see.
                    if starts_in_ms > 600 {
                        sleep(Duration::from_millis(starts_in_ms / 4)).await;
                    }
                }
                match turn {
                    "201" => seen.accepted.push((buyer, answer)),
                    "closed" => return seen,
                    _ => assert_eq!(body["opens_at"], opens_at),
                }
            }
        });
    }
    let seen = timeout(PATIENCE, hammering.join_all()).await.unwrap();
    for seen in &seen {
        assert_eq!(seen.turns, ["not_open", "201", "closed"]);
        assert!(seen.starts_in_ms.iter().all(|ms| *ms > 0));
        assert!(seen.starts_in_ms.is_sorted_by(|a, b| a >= b));
    }
    let accepted: Vec<_> = seen.into_iter().flat_map(|seen| seen.accepted).collect();
    let bodies = acceptances_of(&accepted);
    for body in &bodies {
        let at = body["accepted_at"].as_str().unwrap();
        assert!(
            *opens_at <= *at && *at < *closes_at,
            "{opens_at} {at} {closes_at}"
        );
    }
    assert_eq!(app.view(&sale).await["state"], "closed");

    // After the end a retry still gets its 201.
    let retries = accepted
        .iter()
        .map(|(buyer, _)| app.purchase(&sale, *buyer, "k", r#"{"quantity":1}"#));
    let again = timeout(PATIENCE, in_order(retries)).await.unwrap();
    for (again, (_, first)) in again.iter().zip(&accepted) {
        assert_replays(again, first);
    }
    let expected: Vec<_> = bodies.iter().map(OrderRow::of).collect();
    assert_eq!(stored(&app, &sale).await, expected);
    Arc::into_inner(app).unwrap().finish().await;
}

fn acceptances_of(accepted: &[(Uuid, Answer)]) -> Vec<Value> {
    let mut bodies: Vec<_> = accepted.iter().map(|(_, answer)| answer.json()).collect();
    bodies.sort_by_key(|body| body["seq"].as_u64());
    bodies
}

/// Sends all requests, thirty-two at a time, and gives the answers in the order of the requests.
async fn in_order(requests: impl IntoIterator<Item = RequestBuilder>) -> Vec<Answer> {
    use futures::StreamExt;
    futures::stream::iter(requests.into_iter().map(send))
        .buffered(32)
        .collect()
        .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_sales_at_once_do_not_touch_each_other() {
    let app = App::start().await;
    let one = app
        .sale(json!({ "allocation": 10, "per_buyer_limit": 1 }))
        .await;
    let two = app
        .sale(json!({ "allocation": 15, "per_buyer_limit": 1 }))
        .await;
    let buyers: Vec<_> = (0..60).map(|_| clock::new_id()).collect();
    // The same buyers with the same keys in both.
    let requests = buyers.iter().flat_map(|buyer| {
        [&one, &two].map(|sale| app.purchase(id(sale), *buyer, "k", r#"{"quantity":1}"#))
    });
    let answers = crowd(requests).await;
    let accepted = acceptances(&answers);
    let mut ids = BTreeSet::new();
    for (sale, units) in [(&one, 10), (&two, 15)] {
        let own = accepted.iter().filter(|body| body["sale_id"] == sale["id"]);
        let expected: Vec<_> = own.map(OrderRow::of).collect();
        assert_eq!(expected.len(), units);
        ids.extend(expected.iter().map(|row| row.id));
        assert!((1..).zip(&expected).all(|(seq, row)| row.seq == seq));
        assert_eq!(stored(&app, id(sale)).await, expected);
    }
    assert_eq!(ids.len(), 25);

    // Nobody can be followed from one leaderboard to the other.
    let places = |board: Vec<Value>| -> HashSet<String> {
        let buyers = board.iter().map(|place| place["buyer"].to_string());
        buyers.collect()
    };
    let one = places(leaderboard(&app, id(&one)).await);
    let two = places(leaderboard(&app, id(&two)).await);
    assert!(one.is_disjoint(&two));
    app.finish().await;
}

#[tokio::test]
async fn an_order_is_there_at_once_and_listed_once_it_is_stored() {
    let app = App::start().await;
    let sale = app
        .sale(json!({ "allocation": 40, "per_buyer_limit": 30 }))
        .await;
    let sale = id(&sale);
    let [ada, bob] = [clock::new_id(), clock::new_id()];
    let mut bought = Vec::new();
    for key in 0..25 {
        let answer = app.buy(sale, ada, &key.to_string(), 1).await.expect(201);
        let accepted = answer.json();
        let location = answer.header("location").unwrap();
        assert_eq!(location, format!("/v1/orders/{}", id(&accepted)));
        let order = send(ask(&app, Method::GET, ada, location))
            .await
            .expect(200);
        let mut order = order.json();
        assert!(
            order
                .as_object_mut()
                .unwrap()
                .remove("stored")
                .unwrap()
                .is_boolean()
        );
        assert_eq!(order, accepted);
        bought.push(accepted);
    }
    app.buy(sale, bob, "k", 1).await.expect(201);
    for order in &bought {
        let path = format!("/v1/orders/{}", id(order));
        let is_stored = |answer: &Answer| answer.json()["stored"] == true;
        app.until(&path, is_stored).await;
    }
    cancel(&app, ada, id(&bought[3])).await.expect(200);
    stored(&app, sale).await;

    let ids = |orders: &[Value]| -> Vec<String> {
        orders.iter().map(|order| id(order).to_owned()).collect()
    };
    let mut newest_first = ids(&bought);
    newest_first.reverse();
    let mut listed = Vec::new();
    let mut sizes = Vec::new();
    let mut cursor = String::new();
    loop {
        let path = format!("/v1/orders?limit=10{cursor}");
        let page = send(ask(&app, Method::GET, ada, &path))
            .await
            .expect(200)
            .json();
        let orders = page["data"].as_array().unwrap();
        assert!(orders.iter().all(|order| order["stored"] == true));
        sizes.push(orders.len());
        listed.extend(orders.iter().cloned());
        match page["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    assert_eq!(sizes, [10, 10, 5]);
    assert_eq!(
        BTreeSet::from_iter(ids(&listed)),
        BTreeSet::from_iter(newest_first)
    );
    let times: Vec<_> = listed
        .iter()
        .map(|order| order["accepted_at"].as_str())
        .collect();
    assert!(
        times.is_sorted_by(|newer, older| newer >= older),
        "{times:?}"
    );

    let cancelled = format!("/v1/orders?status=cancelled&sale_id={sale}");
    let cancelled = send(ask(&app, Method::GET, ada, &cancelled))
        .await
        .expect(200);
    let cancelled = cancelled.json();
    assert_eq!(ids(cancelled["data"].as_array().unwrap()), [id(&bought[3])]);
    let own = send(ask(&app, Method::GET, bob, "/v1/orders"))
        .await
        .expect(200);
    assert_eq!(own.json()["data"].as_array().unwrap().len(), 1);
    let others = format!("/v1/orders?buyer_id={ada}");
    refused(
        &send(ask(&app, Method::GET, bob, &others)).await,
        403,
        "forbidden",
    );
    assert_eq!(app.pages(&others).await.len(), 25);
    assert_eq!(app.pages("/v1/orders").await.len(), 26);
    app.finish().await;
}

/// Buys with new keys, again and again, until `done` or the first acceptance; counts the refusals
/// that came from memory.
async fn hammer(app: Arc<App>, sale: String, done: Arc<AtomicBool>) -> (Option<Answer>, u64) {
    let mut from_memory = 0;
    while !done.load(Ordering::Relaxed) {
        let answer = app.buy(&sale, clock::new_id(), "k", 1).await;
        if answer.status == 201 {
            return (Some(answer), from_memory);
        }
        let problem = refused(&answer, 409, "sold_out");
        from_memory += u64::from(problem["retry"] == "same_key");
    }
    (None, from_memory)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_from_memory_never_hit_a_retry() {
    let app = App::start().await;
    let sale = app
        .sale(json!({ "allocation": 20, "per_buyer_limit": 1 }))
        .await;
    let sale = id(&sale).to_owned();
    let buyers: Vec<_> = (0..20).map(|_| clock::new_id()).collect();
    let purchase = |buyer: &Uuid| app.purchase(&sale, *buyer, "k", r#"{"quantity":1}"#);
    let first = in_order(buyers.iter().map(purchase)).await;
    let retries: Vec<_> = (0..50).flat_map(|_| buyers.iter().map(purchase)).collect();

    let app = Arc::new(app);
    let done = Arc::new(AtomicBool::new(false));
    let hammering: JoinSet<_> = (0..16)
        .map(|_| hammer(Arc::clone(&app), sale.clone(), Arc::clone(&done)))
        .collect();
    let again = in_order(retries).await;
    done.store(true, Ordering::Relaxed);
    for (again, first) in again.iter().zip(first.iter().cycle()) {
        assert_replays(again, first);
    }
    let hammered = timeout(PATIENCE, hammering.join_all()).await.unwrap();
    assert!(hammered.iter().all(|(accepted, _)| accepted.is_none()));
    let from_memory: u64 = hammered.iter().map(|(_, count)| count).sum();
    assert!(from_memory > 0, "nothing was refused from memory");
    assert_eq!(stored(&app, &sale).await.len(), 20);
    Arc::into_inner(app).unwrap().finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn units_that_come_back_are_sold_to_those_who_wait() {
    let app = Arc::new(App::start().await);
    let sale = app
        .sale(json!({ "allocation": 5, "per_buyer_limit": 1 }))
        .await;
    let sale = id(&sale).to_owned();
    let first = acceptances(&crowd(strangers(&app, &sale, 5)).await);
    let done = Arc::new(AtomicBool::new(false));
    let mut hammering: JoinSet<_> = (0..8)
        .map(|_| hammer(Arc::clone(&app), sale.clone(), Arc::clone(&done)))
        .collect();
    let mut after = 5;
    for (turn, order) in first.iter().enumerate() {
        if turn < 3 {
            cancel(&app, uuid(&order["buyer_id"]), id(order))
                .await
                .expect(200);
        } else {
            send(restock(&app, &sale, 1, &turn.to_string()))
                .await
                .expect(200);
        }
        // One of those who wait gets it, and nobody else.
        let (lucky, _) = timeout(PATIENCE, hammering.join_next())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        after += 2;
        assert_eq!(lucky.unwrap().json()["seq"], after);
    }
    done.store(true, Ordering::Relaxed);
    let rest = hammering.join_all().await;
    assert!(rest.iter().all(|(accepted, _)| accepted.is_none()));
    assert_counters(&app.view(&sale).await, 7, 0, 7, 15);
    Arc::into_inner(app).unwrap().finish().await;
}
