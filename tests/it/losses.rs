//! Acceptances that are lost: no node goes on without them by itself, an operator may, and then
//! each of them is on a list, and comes back with its receipt before the public buys.

use std::{
    collections::BTreeSet,
    process::Output,
    time::{Duration, Instant},
};

use futures::StreamExt;
use reqwest::Method;
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use stockade::{
    app::Role,
    clock,
    config::Endpoints,
    domain::{
        id::{BuyerId, Partition, SaleId},
        order::Decision,
    },
};
use tokio::time::timeout;
use uuid::Uuid;

use super::{
    faults::{Crowd, assert_not_applied, drop_of, lock_orders, until_fenced},
    selling::{acceptances, ask, refused, rows, steer, stored, strangers, uuid},
    support::{
        Redis,
        app::{Answer, App, PATIENCE, crowd, id, insist, send, sql},
        link::Link,
        process::{Served, stockade},
        wire::Wire,
    },
};

/// Nothing more is stored from now on: the writer has read the first of these orders, and waits.
/// Gives whoever must let go.
async fn hold_up_the_writer(app: &App, sale: &str) -> (PgConnection, Answer) {
    let lock = lock_orders(app, "SHARE").await;
    let first = send(strangers(app, sale, 1).remove(0)).await.expect(201);
    let mut other = sql(app).await;
    let blocked = async {
        let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'
             AND datname = current_database() AND application_name LIKE 'stockade-writer%'";
        while sqlx::query_scalar::<_, i64>(waiting)
            .fetch_one(&mut other)
            .await
            .unwrap()
            == 0
        {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, blocked).await.unwrap();
    (lock, first)
}

/// The writer stores what it had read, and is halted by the fence.
async fn let_go(app: &App, lock: PgConnection) {
    lock.close().await.unwrap();
    let halted = |answer: &Answer| {
        answer
            .text
            .contains("stockade_writer_halted{partition=\"0\"} 1")
    };
    app.until("/metrics", halted).await;
}

async fn flush(app: &App) {
    let mut wire = Wire::connect(&app.redis).await;
    assert_eq!(wire.run(&["FLUSHALL"]).await, "OK");
}

/// Runs `stockade rebuild` and reads what it says of the only partition.
async fn rebuild(app: &App, words: &[&str]) -> (i32, Value) {
    let mut all = vec!["rebuild", "--json"];
    all.extend(words);
    let output = stockade(app, &[], &all).await;
    let text = String::from_utf8(output.stdout).unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    let reports: Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("{text} {error}"));
    (output.status.code().unwrap(), reports[0].clone())
}

/// The incidents, each with its whole list.
async fn incidents(app: &App) -> Vec<(Value, Vec<Value>)> {
    let mut all = Vec::new();
    for incident in app.pages("/v1/incidents").await {
        let path = format!("/v1/incidents/{}", id(&incident));
        let mut list = Vec::new();
        let mut cursor = String::new();
        loop {
            let request = app.operate(Method::GET, &format!("{path}?limit=7{cursor}"));
            let detail = send(request).await.expect(200).json();
            assert_eq!(detail["id"], incident["id"]);
            let page = &detail["acceptances"];
            list.extend(page["data"].as_array().unwrap().iter().cloned());
            match page["next_cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => break,
            }
        }
        all.push((incident, list));
    }
    all
}

/// The orders of bodies, by id and seq.
fn places<'a>(bodies: impl IntoIterator<Item = &'a Value>, name: &str) -> BTreeSet<(Uuid, u64)> {
    let place = |body: &Value| (uuid(&body[name]), body["seq"].as_u64().unwrap());
    bodies.into_iter().map(place).collect()
}

/// Sells to strangers, loses it, and gives what was lost: nobody but the node knows of it.
async fn lose(app: &App, sale: &str, count: usize) -> Vec<Value> {
    let (lock, _) = hold_up_the_writer(app, sale).await;
    let mut lost = Vec::new();
    for request in strangers(app, sale, count) {
        lost.push(send(request).await.expect(201).json());
    }
    flush(app).await;
    until_fenced(app).await;
    let_go(app, lock).await;
    lost
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_goes_on_and_receipts_come_before_the_public() {
    let app = App::start_with(&[("STOCKADE_GRACE_SECONDS", "3600")]).await;
    let sale = drop_of(&app, 10).await;
    let other = drop_of(&app, 10).await;
    steer(&app, &other, "pause").await.expect(200);
    for request in strangers(&app, &sale, 2) {
        send(request).await.expect(201);
    }
    stored(&app, &sale).await;
    let lost = lose(&app, &sale, 5).await;
    for answer in crowd(strangers(&app, &sale, 20)).await {
        assert_not_applied(&answer);
    }

    // What would be lost is said first, and nothing happens without a word.
    let in_danger = async {
        loop {
            let (code, report) = rebuild(&app, &["--dry-run"]).await;
            assert_eq!((code, &report["finding"]), (2, &json!("lossy")), "{report}");
            let found = report["in_danger"].as_array().unwrap();
            if found.len() >= lost.len() {
                assert_eq!(places(found, "order_id"), places(&lost, "id"));
                assert_eq!(
                    report["seen_to"].as_u64().unwrap() - report["recovered_to"].as_u64().unwrap(),
                    5
                );
                return;
            }
        }
    };
    timeout(PATIENCE, in_danger).await.unwrap();
    let (code, report) = rebuild(&app, &[]).await;
    assert_eq!((code, &report["done"]), (2, &Value::Null));
    let text = stockade(&app, &[], &["rebuild"]).await;
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.contains("5 acknowledged orders known"), "{text}");
    assert!(text.contains("--accept-loss"), "{text}");
    until_fenced(&app).await;

    let (code, report) = rebuild(&app, &["--accept-loss"]).await;
    assert_eq!(code, 0, "{report}");
    app.ready().await;
    let (code, report) = rebuild(&app, &["--accept-loss"]).await;
    assert_eq!((code, &report["finding"]), (0, &json!("whole")));
    assert_eq!(report["done"], Value::Null);

    // Nobody but who has a receipt; the other sale lost nothing, and is as its operator wants it.
    assert_eq!(app.view(&sale).await["state"], "paused");
    assert_eq!(app.view(&other).await["state"], "paused");
    steer(&app, &other, "resume").await.expect(200);
    assert_eq!(app.view(&other).await["state"], "open");
    for answer in crowd(strangers(&app, &sale, 20)).await {
        refused(&answer, 409, "paused");
    }
    let [(incident, list)] = &incidents(&app).await[..] else {
        panic!("one incident")
    };
    assert_eq!(places(list, "order_id"), places(&lost, "id"));
    assert_eq!(
        (
            &incident["kind"],
            &incident["listed"],
            &incident["silent_nodes"]
        ),
        (&json!("accepted"), &json!(5), &json!(0))
    );
    for body in &list[..] {
        assert_eq!(
            (&body["sale_id"], &body["came_back"]),
            (&json!(sale), &Value::Null)
        );
    }
    for order in &lost[..4] {
        let receipt = json!({ "receipt": order["receipt"] });
        let redeem = ask(&app, Method::POST, uuid(&order["buyer_id"]), "/v1/receipts");
        send(redeem.json(&receipt)).await.expect(201);
    }
    assert_eq!(stored(&app, &sale).await.len(), 7);
    let (incident, list) = incidents(&app).await.remove(0);
    assert_eq!(incident["came_back"], 4);
    let back = list.iter().filter(|body| !body["came_back"].is_null());
    assert_eq!(places(back, "order_id"), places(&lost[..4], "id"));
    let one_is_out = |answer: &Answer| {
        answer
            .text
            .contains("stockade_lost_acceptances{partition=\"0\"} 1")
            && answer
                .text
                .contains("stockade_incidents{partition=\"0\"} 1")
    };
    app.until("/metrics", one_is_out).await;
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn grace_ends_by_itself_also_after_a_restart_and_after_another_loss() {
    let mut app = App::start_with(&[("STOCKADE_GRACE_SECONDS", "8")]).await;
    let sale = drop_of(&app, 100).await;
    let other = drop_of(&app, 100).await;
    lose(&app, &sale, 3).await;
    assert_eq!(rebuild(&app, &["--accept-loss"]).await.0, 0);
    app.ready().await;
    let until = |view: &Value| view["state"] == "paused";
    assert!(until(&app.view(&sale).await));
    let ends = incidents(&app).await[0].0["grace_until"].clone();
    app.stop().await;
    app.run().await;
    // Redis forgets it, PostgreSQL does not.
    stored(&app, &sale).await;
    flush(&app).await;
    let path = format!("/v1/sales/{sale}");
    // Nobody is shown anything before it has been made anew.
    app.until(&path, |answer| answer.status == 200).await;
    let opened = app
        .until(&path, |answer| {
            answer.status == 200 && answer.json()["state"] == "open"
        })
        .await;
    let ends: chrono::DateTime<chrono::Utc> = ends.as_str().unwrap().parse().unwrap();
    let opened_ms = opened.json()["server_time_ms"].as_i64().unwrap();
    assert!(opened_ms >= ends.timestamp_millis(), "too early");
    send(strangers(&app, &sale, 1).remove(0)).await.expect(201);

    // An operator's pause is still one when grace is over.
    lose(&app, &other, 2).await;
    assert_eq!(rebuild(&app, &["--accept-loss"]).await.0, 0);
    app.ready().await;
    steer(&app, &other, "pause").await.expect(200);
    let now = || clock::now().timestamp_millis();
    let ends = incidents(&app).await[0].0["grace_until"].clone();
    let ends: chrono::DateTime<chrono::Utc> = ends.as_str().unwrap().parse().unwrap();
    while now() <= ends.timestamp_millis() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(app.view(&other).await["state"], "paused");
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drop_goes_on_after_redis_was_emptied_in_its_middle() {
    let app = App::start_with(&[("STOCKADE_GRACE_SECONDS", "0")]).await;
    let sale = drop_of(&app, 500).await;
    // Enough to sell again all that can be lost.
    let mut crowd = Crowd::send(strangers(&app, &sale, 1_000), vec![app.door()]);
    crowd.served(50).await;
    let (lock, first) = hold_up_the_writer(&app, &sale).await;
    let served = *crowd.served.borrow();
    crowd.served(served + 30).await;
    flush(&app).await;
    until_fenced(&app).await;
    assert!(*crowd.served.borrow() < 500, "too late to be in the middle");
    let_go(&app, lock).await;
    let before = *crowd.served.borrow();
    assert_eq!(rebuild(&app, &["--dry-run"]).await.0, 2);
    assert_eq!(*crowd.served.borrow(), before, "sold while fenced");
    assert_eq!(rebuild(&app, &["--accept-loss"]).await.0, 0);
    let mut answers = crowd.done().await;
    answers.push(first);

    // Exactly the allocation is stored; who was told otherwise is on the list, and nobody else.
    let rows = stored(&app, &sale).await;
    assert_eq!(rows.len(), 500);
    let kept: BTreeSet<_> = rows
        .iter()
        .map(|row| (row.id, row.seq.unsigned_abs()))
        .collect();
    let accepted = places(&acceptances(&answers), "id");
    assert!(kept.is_subset(&accepted), "nobody was told of it");
    let lost: BTreeSet<_> = accepted.difference(&kept).copied().collect();
    assert!(lost.len() >= 29, "{}", lost.len());
    let whole =
        |answer: &Answer| answer.json()["data"][0]["listed"].as_u64() == Some(lost.len() as u64);
    app.until("/v1/incidents", whole).await;
    let [(_, list)] = &incidents(&app).await[..] else {
        panic!("one incident")
    };
    assert_eq!(places(list, "order_id"), lost);
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_operators_at_once_lose_it_once() {
    let app = App::start().await;
    let sale = drop_of(&app, 100).await;
    lose(&app, &sale, 4).await;
    let words = ["rebuild", "--accept-loss"];
    let both = [0, 1].map(|_| stockade(&app, &[], &words));
    for Output {
        status,
        stdout,
        stderr,
    } in futures::future::join_all(both).await
    {
        let text = String::from_utf8_lossy(&stdout);
        assert!(
            status.success(),
            "{text} {}",
            String::from_utf8_lossy(&stderr)
        );
    }
    app.ready().await;
    assert_eq!(incidents(&app).await.len(), 1);
    let epochs: Vec<i32> = sqlx::query_scalar("SELECT epoch FROM epochs ORDER BY epoch")
        .fetch_all(&mut sql(&app).await)
        .await
        .unwrap();
    assert_eq!(epochs, [1, 2]);
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_was_cut_off_reports_when_it_is_back() {
    let app = App::start().await;
    let sale = drop_of(&app, 100).await;
    let mut url = reqwest::Url::parse(app.database_url.expose_secret()).unwrap();
    let link = Link::to(url.port().unwrap()).await;
    url.set_port(Some(link.port)).unwrap();
    let endpoints = Endpoints {
        database_url: url.to_string().into(),
        ..app.endpoints()
    };
    // The only writer is the one that is held up below: nobody else reads on.
    let node = app.node_at(endpoints, &[Role::Http]).await;
    let request = strangers(&app, &sale, 1).remove(0);
    insist(request, &[node.door()]).await.expect(201);
    let (lock, _) = hold_up_the_writer(&app, &sale).await;
    let mut lost = Vec::new();
    for request in strangers(&app, &sale, 6) {
        lost.push(send(node.ask(request)).await.expect(201).json());
    }
    // From now on it can tell nobody.
    link.stall();
    flush(&app).await;
    until_fenced(&app).await;
    let_go(&app, lock).await;
    // As long as it may be alive, it is waited for; then it counts as gone.
    let (code, report) = rebuild(&app, &["--accept-loss"]).await;
    assert_eq!((code, &report["silent_nodes"]), (0, &json!(1)), "{report}");
    app.ready().await;
    let [(incident, list)] = &incidents(&app).await[..] else {
        panic!("one incident")
    };
    assert_eq!((&incident["silent_nodes"], list.len()), (&json!(1), 0));

    link.cut();
    link.go_on();
    let whole = |answer: &Answer| answer.json()["data"][0]["listed"] == 6;
    app.until("/v1/incidents", whole).await;
    let (incident, list) = incidents(&app).await.remove(0);
    assert_eq!(places(&list, "order_id"), places(&lost, "id"));
    assert!(incident["seen_to"].as_u64() > incident["recovered_to"].as_u64());
    node.stop().await;
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_doubt_that_nobody_can_clear_is_an_incident() {
    let redis = Redis::start_with(|options| {
        let sync = ("appendfsync".to_owned(), "everysec".to_owned());
        options.settings.push(sync);
    })
    .await;
    let mut app = App::on(redis, &[]).await;
    let mut node = Served::start(&app).await;
    app.speak_to(node.url());
    let sale = drop_of(&app, 100).await;
    crowd(strangers(&app, &sale, 5)).await;
    // Whoever sold is gone with the server, without a word.
    node.kill().await;
    app.redis.server.kill().await;
    app.redis.server.restart().await.unwrap();
    node.start_again().await;
    app.speak_to(node.url());
    let [(incident, list)] = &incidents(&app).await[..] else {
        panic!("one incident")
    };
    assert_eq!(
        (&incident["kind"], &incident["silent_nodes"]),
        (&json!("possible"), &json!(1))
    );
    assert!(list.is_empty());
    assert_eq!(stored(&app, &sale).await.len(), 5);
    assert!(node.stop().await.success());
    node.start_again().await;
    app.speak_to(node.url());
    // It had its last word: nothing is in doubt.
    assert_eq!(incidents(&app).await.len(), 1);
    app.finish().await;
    assert!(node.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_sells_in_an_older_epoch_stops_by_itself() {
    let app = App::start().await;
    let sale = drop_of(&app, 100).await;
    let raised: i32 = sqlx::query_scalar(
        "UPDATE journal_positions SET epoch = epoch + 1 WHERE partition = 0 RETURNING epoch",
    )
    .fetch_one(&mut sql(&app).await)
    .await
    .unwrap();
    // Nobody asks it for anything.
    let installed = async {
        loop {
            let epoch: i32 = sqlx::query_scalar("SELECT installed_epoch FROM journal_positions")
                .fetch_one(&mut sql(&app).await)
                .await
                .unwrap();
            if epoch > raised {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, installed).await.unwrap();
    app.ready().await;
    for answer in crowd(strangers(&app, &sale, 5)).await {
        answer.expect(201);
    }
    assert_eq!(rows(&app, &sale).await.len().max(5), 5);
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_letter_counts_after_a_rebuild_and_can_be_stored_later() {
    let app = App::start().await;
    let sale = app
        .sale(json!({ "allocation": 10, "per_buyer_limit": 3 }))
        .await;
    let sale = id(&sale).to_owned();
    let poison = "ALTER TABLE orders ADD CONSTRAINT poison CHECK (quantity <> 2)";
    let mut sql = sql(&app).await;
    sqlx::raw_sql(poison).execute(&mut sql).await.unwrap();
    let buyers = [clock::new_id(), clock::new_id()];
    let mut orders = Vec::new();
    for buyer in buyers {
        orders.push(app.buy(&sale, buyer, "k", 2).await.expect(201));
    }
    // One of them comes back: that is a dead letter, too.
    let cancel = format!("/v1/orders/{}/cancel", id(&orders[1].json()));
    send(app.operate(Method::POST, &cancel)).await.expect(200);
    let path = format!("/v1/sales/{sale}/audit");
    let noted = |answer: &Answer| {
        let text = &answer.text;
        answer.status == 200 && text.contains("2 units not persisted") && !text.contains("pending")
    };
    app.until(&path, noted).await;
    flush(&app).await;
    let path = format!("/v1/sales/{sale}");
    // Nobody is shown anything before it has been made anew.
    app.until(&path, |answer| answer.status == 200).await;

    // Units, limit, idempotency and what became of each are as before.
    let view = app.view(&sale).await;
    assert_eq!((&view["sold"], &view["remaining"]), (&json!(2), &json!(8)));
    refused(
        &app.buy(&sale, buyers[0], "more", 2).await,
        409,
        "buyer_limit",
    );
    let again = app.buy(&sale, buyers[0], "k", 2).await;
    super::selling::assert_replays(&again, &orders[0]);
    let path = format!("/v1/orders/{}", id(&orders[1].json()));
    let returned = send(app.operate(Method::GET, &path)).await.expect(200);
    assert_eq!(returned.json()["status"], "cancelled");
    app.buy(&sale, buyers[1], "more", 3).await.expect(201);

    let listed = stockade(&app, &[], &["dead-letters", "list", "--json"]).await;
    let listed: Value = serde_json::from_slice(&listed.stdout).unwrap();
    assert_eq!(listed.as_array().unwrap().len(), 3);
    let kept = stockade(&app, &[], &["dead-letters", "redrive"]).await;
    assert_eq!(kept.status.code(), Some(2));
    let mended = "ALTER TABLE orders DROP CONSTRAINT poison";
    sqlx::raw_sql(mended).execute(&mut sql).await.unwrap();
    let redriven = stockade(&app, &[], &["dead-letters", "redrive"]).await;
    let text = String::from_utf8(redriven.stdout).unwrap();
    assert_eq!(redriven.status.code(), Some(0), "{text}");
    assert_eq!(text.matches(": stored").count(), 3, "{text}");
    assert_eq!(stored(&app, &sale).await.len(), 3);
    app.finish().await;
}

/// Orders of the measured sale: `make rebuild-time` has a hundred thousand.
fn orders() -> u64 {
    let orders = std::env::var("STOCKADE_TEST_ORDERS");
    orders.map_or(400, |orders| orders.parse().unwrap())
}

/// Sells to so many, past HTTP, as fast as the engine takes them.
async fn sell(app: &App, sale: &str, count: u64) {
    let shop = app.shop();
    let sale = SaleId(sale.parse().unwrap());
    futures::stream::iter(0..count)
        .for_each_concurrent(512, async |_| {
            let buyer = BuyerId(clock::new_id());
            let (answer, _) = shop.purchase(sale, buyer.into(), "k", 1).await.unwrap();
            assert!(matches!(answer.decision, Decision::Accepted(_)));
        })
        .await;
}

/// Seconds until the next purchase is accepted.
async fn until_it_sells(app: &App, sale: &str, since: Instant) -> f64 {
    let request = strangers(app, sale, 1).remove(0);
    loop {
        let attempt = send(request.try_clone().unwrap()).await;
        if attempt.status == 201 {
            break;
        }
        assert_not_applied(&attempt);
        assert!(since.elapsed() < Duration::from_mins(2), "too late");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    since.elapsed().as_secs_f64()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_sale_is_made_anew() {
    let count = orders();
    let app = App::start_with(&[("STOCKADE_GRACE_SECONDS", "0")]).await;
    let sale = app
        .sale(json!({ "allocation": count + 100, "per_buyer_limit": 1 }))
        .await;
    let sale = id(&sale).to_owned();
    sell(&app, &sale, count - count / 10).await;
    drained(&app).await;
    let flushed = Instant::now();
    flush(&app).await;
    let stored_all = until_it_sells(&app, &sale, flushed).await;

    // The last tenth is not stored when it is lost.
    let (lock, _) = hold_up_the_writer(&app, &sale).await;
    sell(&app, &sale, count / 10).await;
    let flushed = Instant::now();
    flush(&app).await;
    until_fenced(&app).await;
    let_go(&app, lock).await;
    let (code, report) = rebuild(&app, &["--accept-loss"]).await;
    assert_eq!(code, 0, "{}", report["reason"]);
    let with_loss = until_it_sells(&app, &sale, flushed).await;
    let listed = &incidents(&app).await[0].0["listed"];
    println!(
        "{count} orders: sells {stored_all:.1} s after FLUSHALL when all are stored, {with_loss:.1} s \
         when {listed} are not and an operator goes on at once"
    );
    app.finish().await;
}

/// Waits until everything is stored.
async fn drained(app: &App) {
    let shop = app.shop();
    let sold = shop.engines.of(Partition(0)).unwrap().floor();
    let deadline = Instant::now() + Duration::from_mins(5);
    while shop.positions.of(Partition(0)).await.unwrap().stored < sold {
        assert!(Instant::now() < deadline, "too late");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
