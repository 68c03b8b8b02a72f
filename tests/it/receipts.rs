//! Receipts: what they prove, who may redeem them, and that every lost order comes back once.

use std::fs;

use chrono::DateTime;
use futures::future::join_all;
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use sqlx::Row;
use stockade::{
    app::{self, Role},
    clock,
    config::Config,
    domain::{
        durability::Said,
        id::{Epoch, Partition},
        order::Order,
        receipt::{Receipt, ReceiptKeys},
    },
    engine::{Engine, EngineOptions},
    lifecycle::Lifecycle,
    metrics::EngineMetrics,
};
use uuid::Uuid;

use super::{
    faults::{copy_files, lock_orders},
    selling::{
        OrderRow, acceptances, ask, assert_replays, cancel, refused, rows, steer, stored,
        strangers, uuid,
    },
    support::app::{Answer, App, SECRET, crowd, id, send, sql},
};

/// The keys that an application of the tests has, if it is given none.
fn keys() -> ReceiptKeys {
    ReceiptKeys::new(&[(1, &ReceiptKeys::derive(SECRET.as_bytes()))]).unwrap()
}

fn redemption(app: &App, buyer: Uuid, receipt: &str) -> RequestBuilder {
    ask(app, Method::POST, buyer, "/v1/receipts").json(&json!({ "receipt": receipt }))
}

async fn redeem(app: &App, order: &Value) -> Answer {
    let receipt = order["receipt"].as_str().unwrap();
    send(redemption(app, uuid(&order["buyer_id"]), receipt)).await
}

/// A sale of one unit to each of these buyers, with the key `k`.
async fn sell(app: &App, sale: &str, buyers: &[Uuid]) -> Vec<Answer> {
    let bought = buyers.iter().map(|buyer| app.buy(sale, *buyer, "k", 1));
    let bought = join_all(bought).await;
    bought
        .into_iter()
        .map(|answer| answer.expect(201))
        .collect()
}

fn buyers(count: usize) -> Vec<Uuid> {
    (0..count).map(|_| clock::new_id()).collect()
}

/// What `sell` accepts is lost: Redis comes back as it was before, PostgreSQL never had it, and
/// the epoch that begins then says so. Gives the answers that were lost.
///
/// It stands for the loss of everything behind the last sync or the last replica, and for the
/// recovery that lets the partition sell again.
async fn lose(app: &mut App, sell: impl AsyncFnOnce(&App) -> Vec<Answer>) -> Vec<Answer> {
    for sale in app.pages("/v1/sales").await {
        stored(app, id(&sale)).await;
    }
    let mut sql = lock_orders(app, "SHARE").await;
    let position = "SELECT epoch, position FROM journal_positions WHERE partition = 0";
    let row = sqlx::query(position).fetch_one(&mut sql).await.unwrap();
    let (epoch, end): (i32, i64) = (row.get("epoch"), row.get("position"));
    let aof = app.redis.dir().join("appendonlydir");
    let past = app.redis.dir().join("past");
    // Every write is in the file before it is answered.
    copy_files(&aof, &past);
    let lost = sell(app).await;

    app.redis.server.kill().await;
    app.stop().await;
    fs::remove_dir_all(&aof).unwrap();
    fs::rename(&past, &aof).unwrap();
    app.redis.server.restart().await.unwrap();
    sqlx::raw_sql("ROLLBACK").execute(&mut sql).await.unwrap();
    // Somebody decides that what the node had seen is lost: otherwise nothing is sold any more.
    sqlx::raw_sql("DELETE FROM node_floors")
        .execute(&mut sql)
        .await
        .unwrap();
    let began = "INSERT INTO epochs (partition, epoch, recovered_to) VALUES (0, $1, $2)
                 ON CONFLICT DO NOTHING";
    sqlx::query(began)
        .bind(epoch + 1)
        .bind(end)
        .execute(&mut sql)
        .await
        .unwrap();
    app.run().await;
    lost
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_lost_order_comes_back_once_with_its_receipt() {
    let mut app = App::start().await;
    let sale = app
        .sale(json!({ "allocation": 20, "per_buyer_limit": 2 }))
        .await;
    let sale = id(&sale).to_owned();
    let kept = sell(&app, &sale, &buyers(3)).await;
    let unlucky = buyers(10);
    let lost = lose(&mut app, async |app| sell(app, &sale, &unlucky).await).await;
    assert_eq!(rows(&app, &sale).await.len(), 3);
    assert_eq!(app.view(&sale).await["sold"], 3);

    // What was not lost is shown, and nothing else happens.
    for answer in &kept {
        let order = answer.json();
        let found = redeem(&app, &order).await.expect(200).json();
        assert_eq!((&found["id"], &found["seq"]), (&order["id"], &order["seq"]));
        assert_eq!(found["receipt"], order["receipt"]);
    }
    assert_eq!(app.view(&sale).await["seq"], 3);

    // One retries before he redeems: one order, whichever way it came back.
    let retried = app.buy(&sale, unlucky[0], "k", 1).await.expect(201);
    assert_eq!(retried.header("idempotency-replayed"), None);
    let found = redeem(&app, &lost[0].json()).await.expect(200).json();
    assert_eq!(found["seq"], retried.json()["seq"]);

    // While nobody can buy: all the others, each from two devices at once.
    steer(&app, &sale, "pause").await.expect(200);
    refused(
        &app.buy(&sale, clock::new_id(), "k", 1).await,
        409,
        "paused",
    );
    let twice = lost[1..8].iter().map(Answer::json).flat_map(|order| {
        let buyer = uuid(&order["buyer_id"]);
        let receipt = order["receipt"].as_str().unwrap().to_owned();
        [0, 1].map(|_| redemption(&app, buyer, &receipt))
    });
    let answers = crowd(twice).await;
    for answer in &answers {
        assert!([200, 201].contains(&answer.status.as_u16()), "{answer:?}");
    }
    assert_eq!(acceptances(&answers).len(), 7);
    steer(&app, &sale, "close").await.expect(200);
    refused(
        &app.buy(&sale, clock::new_id(), "k", 1).await,
        409,
        "closed",
    );
    let mut again = vec![retried];
    again.extend(answers.into_iter().filter(|answer| answer.status == 201));
    again.push(redeem(&app, &lost[8].json()).await.expect(201));
    // An operator may do it for the buyer.
    let receipt = json!({ "receipt": lost[9].json()["receipt"] });
    let operator = app.operate(Method::POST, "/v1/receipts").json(&receipt);
    again.push(send(operator).await.expect(201));

    for before in &lost {
        let before = before.json();
        let same = |answer: &&Answer| answer.json()["id"] == before["id"];
        let found: Vec<_> = again.iter().filter(same).collect();
        assert_eq!(found.len(), 1, "{before}");
        let after = found[0].json();
        for member in [
            "sale_id",
            "round",
            "buyer_id",
            "quantity",
            "unit_price",
            "status",
        ] {
            assert_eq!(after[member], before[member], "{member}");
        }
        assert_ne!(after["receipt"], before["receipt"]);
        assert_eq!(
            found[0].header("location").unwrap().len(),
            "/v1/orders/".len() + 36
        );
        let [old, new] = [&before, &after].map(|body| {
            keys()
                .verify(body["receipt"].as_str().unwrap())
                .unwrap()
                .order
        });
        assert!(new.epoch > old.epoch);
        // From now on a retry of the purchase gets the new answer, and both receipts find it.
        let buyer = uuid(&before["buyer_id"]);
        assert_replays(&app.buy(&sale, buyer, "k", 1).await, found[0]);
        for order in [&before, &after] {
            let shown = redeem(&app, order).await.expect(200).json();
            assert_eq!(shown["seq"], after["seq"]);
        }
    }
    let mut expected: Vec<_> = kept.iter().chain(&again).map(Answer::json).collect();
    expected.sort_by_key(|body| body["seq"].as_u64());
    let expected: Vec<_> = expected.iter().map(OrderRow::of).collect();
    assert_eq!(stored(&app, &sale).await, expected);
    assert_eq!(app.view(&sale).await["sold"], 13);
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redeeming_keeps_stock_and_limits() {
    let mut app = App::start().await;
    let sale = app
        .sale(json!({ "allocation": 5, "per_buyer_limit": 2 }))
        .await;
    let sale = id(&sale).to_owned();
    let unlucky = buyers(5);
    let lost = lose(&mut app, async |app| sell(app, &sale, &unlucky).await).await;
    // One buyer fills his limit anew, a stranger takes one more.
    app.buy(&sale, unlucky[0], "new", 2).await.expect(201);
    crowd(strangers(&app, &sale, 1))
        .await
        .pop()
        .unwrap()
        .expect(201);
    let problem = redeem(&app, &lost[0].json()).await;
    let problem = refused(&problem, 409, "buyer_limit");
    assert_eq!(
        (&problem["limit"], &problem["held"]),
        (&json!(2), &json!(2))
    );

    // Two units for four receipts.
    let lost: Vec<_> = lost.iter().map(Answer::json).collect();
    let answers = join_all(lost[1..].iter().map(|order| redeem(&app, order))).await;
    assert_eq!(acceptances(&answers).len(), 2);
    let unserved = answers.iter().filter(|answer| answer.status != 201);
    for answer in unserved {
        refused(answer, 409, "sold_out");
    }
    assert_eq!(app.view(&sale).await["sold"], 5);
    // A unit that comes back goes to whoever redeems next; a refusal has left nothing behind.
    let mine = rows(&app, &sale).await.len();
    assert!(mine <= 4);
    let first = stored(&app, &sale).await.remove(0);
    cancel(&app, first.buyer, &first.id.to_string())
        .await
        .expect(200);
    let answers = join_all(lost.iter().map(|order| redeem(&app, order))).await;
    let statuses: Vec<_> = answers
        .iter()
        .map(|answer| answer.status.as_u16())
        .collect();
    assert_eq!(statuses.iter().filter(|status| **status == 201).count(), 2);
    let orders = stored(&app, &sale).await;
    let sold = orders.iter().filter(|row| row.status == "confirmed");
    assert_eq!(sold.map(|row| row.quantity).sum::<i64>(), 5);
    app.finish().await;
}

/// An order that nobody ever accepted, signed all the same, with this changed.
fn signed(of: &Value, keys: &ReceiptKeys, change: impl Fn(&mut Receipt)) -> String {
    let mut receipt = self::keys()
        .verify(of["receipt"].as_str().unwrap())
        .unwrap();
    receipt.order.id.0 = Uuid::from_u128(receipt.order.id.0.as_u128() ^ 1);
    change(&mut receipt);
    keys.sign(receipt.sale, &receipt.order).unwrap().unwrap()
}

#[tokio::test]
async fn only_a_genuine_receipt_of_a_reported_loss_is_redeemed() {
    let app = App::start().await;
    let sale = app
        .sale(json!({ "allocation": 9, "per_buyer_limit": 9 }))
        .await;
    let sale = id(&sale).to_owned();
    let buyer = clock::new_id();
    let order = app.buy(&sale, buyer, "k", 1).await.expect(201).json();
    let own = order["receipt"].as_str().unwrap();
    let seq = async || app.view(&sale).await["seq"].clone();
    assert_eq!(seq().await, 1);

    let other = ReceiptKeys::new(&[(1, &[7; 32])]).unwrap();
    let unknown = ReceiptKeys::new(&[(2, &[7; 32])]).unwrap();
    for (receipt, detail) in [
        (String::new(), "not a receipt"),
        ("v1".to_owned(), "not a receipt"),
        (own[..own.len() - 1].to_owned(), "not a receipt"),
        (own[1..].to_owned(), "not a receipt"),
        (own.replacen("v1.1.A", "v1.1.B", 1), "not a receipt"),
        (own.replacen("v1.1.", "v1.2.", 1), "not known here"),
        (signed(&order, &other, |_| {}), "not a receipt"),
        (
            signed(&order, &unknown, |receipt| receipt.order.receipt_key = 2),
            "not known here",
        ),
    ] {
        let answer = send(redemption(&app, buyer, &receipt)).await;
        let problem = refused(&answer, 422, "receipt_invalid");
        assert_eq!(problem["errors"][0]["pointer"], "#/receipt");
        let found = problem["errors"][0]["detail"].as_str().unwrap();
        assert!(found.contains(detail), "{receipt}: {found}");
        assert_eq!(problem["outcome"], "not_applied");
    }
    for (body, status) in [("{}", 400), ("{\"receipt\": 1}", 400), ("[", 400)] {
        let request = ask(&app, Method::POST, buyer, "/v1/receipts")
            .header("Content-Type", "application/json")
            .body(body);
        refused(&send(request).await, status, "validation");
    }
    let nobody = app
        .request(Method::POST, "/v1/receipts")
        .json(&json!({ "receipt": own }));
    refused(&send(nobody).await, 401, "unauthenticated");
    let stranger = send(redemption(&app, clock::new_id(), own)).await;
    refused(&stranger, 403, "forbidden");

    // Known, also when it has been given back since: as it is now.
    cancel(&app, buyer, id(&order)).await.expect(200);
    let found = send(redemption(&app, buyer, own)).await.expect(200).json();
    assert_eq!(found["status"], "cancelled");
    assert_eq!(seq().await, 2);

    // Genuine, and unknown: only behind the recovered end of an older epoch.
    let began =
        "INSERT INTO epochs (partition, epoch, recovered_to) VALUES (0, 2, 100), (0, 3, 90)";
    sqlx::raw_sql(began)
        .execute(&mut sql(&app).await)
        .await
        .unwrap();
    let lost = |receipt: &mut Receipt| (receipt.order.epoch, receipt.order.pseq) = (Epoch(1), 91);
    let refusals: [fn(&mut Receipt); 6] = [
        |receipt| receipt.order.pseq = 90,
        |receipt| receipt.order.epoch = Epoch(3),
        |receipt| receipt.sale.0 = Uuid::from_u128(1),
        |receipt| receipt.order.id.0 = Uuid::from_u128(99 << 96),
        |receipt| receipt.order.unit_price.amount += 1,
        |receipt| receipt.order.round.round = 2,
    ];
    for (at, change) in refusals.into_iter().enumerate() {
        let receipt = signed(&order, &keys(), |receipt| {
            lost(receipt);
            change(receipt);
        });
        let problem = refused(
            &send(redemption(&app, buyer, &receipt)).await,
            409,
            "not_redeemable",
        );
        assert_eq!(problem["outcome"], "not_applied", "{at}");
    }
    assert_eq!(seq().await, 2);
    let receipt = signed(&order, &keys(), lost);
    send(redemption(&app, buyer, &receipt)).await.expect(201);
    assert_eq!(seq().await, 3);
    app.finish().await;
}

const TWO: &str = "2:the second key of the tests has 32 bytes";
const THREE: &str = "3:the third key of the tests has 32 bytes";

/// The application, started anew with these keys.
async fn restart_with(app: &mut App, keys: &str) {
    app.stop().await;
    app.set("STOCKADE_RECEIPT_KEYS", keys);
    app.run().await;
}

#[tokio::test]
async fn keys_change_and_every_replay_keeps_its_bytes() {
    let mut app = App::start().await;
    let sale = app.sale(json!({ "allocation": 9 })).await;
    let sale = id(&sale).to_owned();
    let [ada, bob] = [clock::new_id(), clock::new_id()];
    let one = app.buy(&sale, ada, "k", 1).await.expect(201);
    assert!(one.json()["receipt"].as_str().unwrap().starts_with("v1.1."));
    restart_with(&mut app, TWO).await;
    let two = app.buy(&sale, bob, "k", 1).await.expect(201);
    assert!(two.json()["receipt"].as_str().unwrap().starts_with("v1.2."));
    assert_replays(&app.buy(&sale, ada, "k", 1).await, &one);
    redeem(&app, &one.json()).await.expect(200);

    // Key 2 has gone: its order is there, but no answer could have the same bytes.
    restart_with(&mut app, THREE).await;
    assert_replays(&app.buy(&sale, ada, "k", 1).await, &one);
    let problem = refused(&app.buy(&sale, bob, "k", 1).await, 503, "unavailable");
    assert_eq!(
        (&problem["outcome"], &problem["retry"]),
        (&json!("unknown"), &json!("after"))
    );
    let path = two.header("location").unwrap();
    let view = send(ask(&app, Method::GET, bob, path))
        .await
        .expect(200)
        .json();
    assert_eq!(
        (&view["id"], view.get("receipt")),
        (&two.json()["id"], None)
    );
    refused(&redeem(&app, &two.json()).await, 422, "receipt_invalid");

    restart_with(&mut app, &format!("{THREE}, {TWO}")).await;
    assert_replays(&app.buy(&sale, bob, "k", 1).await, &two);
    redeem(&app, &two.json()).await.expect(200);
    let versions = "SELECT count(*) FROM orders WHERE body_version = 2";
    assert_eq!(stored(&app, &sale).await.len(), 2);
    let count: i64 = sqlx::query_scalar(versions)
        .fetch_one(&mut sql(&app).await)
        .await
        .unwrap();
    assert_eq!(count, 2);
    app.finish().await;
}

#[tokio::test]
async fn another_secret_under_a_known_number_is_noticed() {
    let mut app = App::start_with(&[("STOCKADE_RECEIPT_KEYS", TWO)]).await;
    let sale = app.sale(json!({ "allocation": 9 })).await;
    let sale = id(&sale).to_owned();
    let ada = clock::new_id();
    let first = app.buy(&sale, ada, "k", 1).await.expect(201);

    // Nothing is signed with it.
    let other = "2:another key of the tests with 32 bytes";
    app.stop().await;
    app.set("STOCKADE_RECEIPT_KEYS", other);
    let config = Config::load(app.environment()).unwrap();
    let life = Lifecycle::new();
    let started = app::start(&config, &app.endpoints(), Role::ALL, &life).await;
    let error = started.err().unwrap().to_string();
    assert!(
        error.contains("receipt key 2 has another secret"),
        "{error}"
    );

    // Nor told in other bytes, nor believed.
    restart_with(&mut app, &format!("{THREE}, {other}")).await;
    let problem = refused(&app.buy(&sale, ada, "k", 1).await, 503, "unavailable");
    assert_eq!(problem["outcome"], "unknown");
    refused(&redeem(&app, &first.json()).await, 422, "receipt_invalid");
    let new = app.buy(&sale, ada, "new", 1).await.expect(201);
    restart_with(&mut app, &format!("{THREE}, {TWO}")).await;
    assert_replays(&app.buy(&sale, ada, "k", 1).await, &first);
    assert_replays(&app.buy(&sale, ada, "new", 1).await, &new);
    app.finish().await;
}

#[tokio::test]
async fn an_order_from_before_receipts_keeps_its_body() {
    let app = App::start().await;
    let sale = app.sale(json!({ "allocation": 9 })).await;
    let sale = id(&sale).to_owned();
    let options = EngineOptions {
        url: app.redis.url(),
        queue_capacity: 1,
        said: Said::default(),
        receipt_key: 0,
    };
    let old = Engine::connect(&options, Partition(0), EngineMetrics::default())
        .await
        .unwrap();
    let inspection = old.inspect().await.unwrap();
    old.adopt(inspection.epoch.unwrap(), &inspection);
    let buyer = clock::new_id();
    let order: Order = super::idempotency::accept(&app, &old, &sale, buyer, "k").await;
    let again = app.buy(&sale, buyer, "k", 1).await.expect(201);
    assert_eq!(again.header("idempotency-replayed"), Some("true"));
    let at = DateTime::from_timestamp_millis(order.accepted_at_ms).unwrap();
    let expected = format!(
        "{{\"id\":\"{}\",\"sale_id\":\"{sale}\",\"round\":1,\"buyer_id\":\"{buyer}\",\"quantity\":1,\
         \"unit_price\":{{\"amount\":1999,\"currency\":\"EUR\"}},\
         \"total\":{{\"amount\":1999,\"currency\":\"EUR\"}},\"status\":\"confirmed\",\"seq\":1,\
         \"accepted_at\":\"{}\",\"durability\":\"fsync\"}}",
        order.id,
        at.format("%Y-%m-%dT%H:%M:%S%.3fZ"),
    );
    assert_eq!(again.text, expected);
    let path = again.header("location").unwrap().to_owned();
    let view = send(ask(&app, Method::GET, buyer, &path))
        .await
        .expect(200)
        .json();
    assert_eq!(view.get("receipt"), None);
    stored(&app, &sale).await;
    let version: i16 = sqlx::query_scalar("SELECT body_version FROM orders")
        .fetch_one(&mut sql(&app).await)
        .await
        .unwrap();
    assert_eq!(version, 1);
    app.finish().await;
}
