//! What may break while a crowd buys: Redis, PostgreSQL, the application, and what somebody does to
//! them by hand. Nothing is ever sold twice, no acceptance is lost, and when in doubt nothing is
//! sold.

use std::{collections::HashSet, fs, path::Path, time::Duration};

use futures::StreamExt;
use reqwest::{Method, RequestBuilder};
use serde_json::json;
use sqlx::{AssertSqlSafe, PgConnection};
use stockade::{app::Role, clock};
use tokio::{sync::watch, task::JoinHandle, time::timeout};
use uuid::Uuid;

use super::{
    selling::{OrderRow, acceptances, assert_replays, refused, rows, stored, strangers},
    support::{
        app::{Answer, App, PATIENCE, crowd, id, insist, send, sql, try_send},
        wire::Wire,
    },
};

/// A crowd of whom thirty-two at a time insist on an answer.
pub(crate) struct Crowd {
    answers: JoinHandle<Vec<Answer>>,
    pub(crate) served: watch::Receiver<usize>,
}

impl Crowd {
    pub(crate) fn send(requests: Vec<RequestBuilder>, doors: Vec<watch::Receiver<String>>) -> Self {
        let (sender, served) = watch::channel(0);
        let answers = tokio::spawn(async move {
            futures::stream::iter(requests)
                .map(|request| insist(request, &doors))
                .buffer_unordered(32)
                .inspect(|_| sender.send_modify(|served| *served += 1))
                .collect()
                .await
        });
        Self { answers, served }
    }

    /// Returns once so many have their answer.
    pub(crate) async fn served(&mut self, count: usize) {
        let served = self.served.wait_for(|served| *served >= count);
        timeout(PATIENCE, served).await.unwrap().unwrap();
    }

    /// Everybody's answers.
    pub(crate) async fn done(self) -> Vec<Answer> {
        self.answers.await.unwrap()
    }
}

/// Exactly so many were accepted, and PostgreSQL has exactly them.
pub(crate) async fn assert_sold(app: &App, sale: &str, answers: &[Answer], units: usize) {
    for answer in answers.iter().filter(|answer| answer.status != 201) {
        refused(answer, 409, "sold_out");
    }
    let accepted: Vec<_> = acceptances(answers).iter().map(OrderRow::of).collect();
    assert_eq!(accepted.len(), units);
    assert!((1..).zip(&accepted).all(|(seq, row)| row.seq == seq));
    assert_eq!(stored(app, sale).await, accepted);
}

/// A sale of units of which every buyer gets one.
pub(crate) async fn drop_of(app: &App, units: u64) -> String {
    let sale = app
        .sale(json!({ "allocation": units, "per_buyer_limit": 1 }))
        .await;
    id(&sale).to_owned()
}

/// Nothing was done, and the answer says so.
#[track_caller]
pub(crate) fn assert_not_applied(answer: &Answer) {
    let problem = refused(answer, 503, "unavailable");
    assert_eq!(problem["outcome"], "not_applied", "{answer:?}");
    assert!(answer.header("retry-after").is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_dies_in_the_middle_of_a_crowd() {
    let mut app = App::start().await;
    let sale = drop_of(&app, 100).await;
    let mut crowd = Crowd::send(strangers(&app, &sale, 300), vec![app.door()]);
    for served in [20, 60] {
        crowd.served(served).await;
        app.redis.server.kill().await;
        app.redis.server.restart().await.unwrap();
        assert!(*crowd.served.borrow() < 300, "too late to be in the middle");
    }
    let answers = crowd.done().await;
    assert_sold(&app, &sale, &answers, 100).await;
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_application_restarts_in_the_middle_of_a_crowd() {
    let mut app = App::start().await;
    let sale = drop_of(&app, 100).await;
    let mut crowd = Crowd::send(strangers(&app, &sale, 300), vec![app.door()]);
    crowd.served(30).await;
    app.stop().await;
    assert!(*crowd.served.borrow() < 300, "too late to be in the middle");
    app.run().await;
    let answers = crowd.done().await;
    assert_sold(&app, &sale, &answers, 100).await;
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopping_application_answers_whole_or_not_at_all() {
    let mut app = App::start().await;
    let sale = drop_of(&app, 100_000).await;
    let (sender, mut accepted) = watch::channel(0);
    let buying: Vec<_> = (0..16)
        .map(|_| {
            let (requests, sender) = (strangers(&app, &sale, 300), sender.clone());
            tokio::spawn(async move {
                let mut bought = Vec::new();
                for request in requests {
                    let again = request.try_clone().unwrap();
                    // An answer that has begun and does not end fails the test in here.
                    match try_send(request).await {
                        Ok(answer) if answer.status == 201 => bought.push(answer),
                        Ok(answer) => {
                            assert_not_applied(&answer);
                            return (bought, again);
                        }
                        Err(_) => return (bought, again),
                    }
                    sender.send_modify(|accepted| *accepted += 1);
                }
                panic!("nobody stopped it");
            })
        })
        .collect();
    let enough = accepted.wait_for(|accepted| *accepted >= 100);
    timeout(PATIENCE, enough).await.unwrap().unwrap();
    app.stop().await;
    let mut answers = Vec::new();
    let mut left_out = Vec::new();
    for buyer in buying {
        let (bought, unlucky) = timeout(PATIENCE, buyer).await.unwrap().unwrap();
        answers.extend(bought);
        left_out.push(unlucky);
    }
    // Whoever got no answer got nothing: what is stored are the answers.
    let expected: Vec<_> = acceptances(&answers).iter().map(OrderRow::of).collect();
    assert_eq!(rows(&app, &sale).await, expected);
    app.run().await;
    for request in left_out {
        let answer = insist(request, &[app.door()]).await.expect(201);
        assert_eq!(answer.header("idempotency-replayed"), None);
    }
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_forgets_its_scripts_again_and_again() {
    let app = App::start().await;
    let sale = drop_of(&app, 100).await;
    let mut wire = Wire::connect(&app.redis).await;
    let (stop, stopping) = watch::channel(false);
    let flushing = tokio::spawn(async move {
        let mut flushes = 0;
        while !*stopping.borrow() {
            assert_eq!(wire.run(&["SCRIPT", "FLUSH"]).await, "OK");
            flushes += 1;
        }
        flushes
    });
    let answers = crowd(strangers(&app, &sale, 200)).await;
    let last = acceptances(&answers).pop().unwrap();
    let path = format!("/v1/orders/{}/cancel", id(&last));
    send(app.operate(Method::POST, &path)).await.expect(200);
    stop.send_replace(true);
    assert!(flushing.await.unwrap() > 10);
    assert_eq!(acceptances(&answers).len(), 100);
    for answer in answers.iter().filter(|answer| answer.status != 201) {
        refused(answer, 409, "sold_out");
    }
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_round_that_lost_a_key_sells_nothing_until_it_is_whole_again() {
    let app = App::start().await;
    let other = drop_of(&app, 1_000).await;
    let mut others = 0;
    let mut wire = Wire::connect(&app.redis).await;
    let mut sql = sql(&app).await;
    let one = r#"{"quantity":1}"#;
    for key in [
        "round:N.1",
        "round:N.1:buyers",
        "round:N.1:board",
        "sale:N",
        "sale:N:orders",
    ] {
        for overwritten in [false, true] {
            let sale = drop_of(&app, 10).await;
            let buyers = [clock::new_id(), clock::new_id()];
            let requests = buyers.map(|buyer| app.purchase(&sale, buyer, "k", one));
            let (_, bought) = bought(requests.into()).await;
            let bought = acceptances(&bought);
            let expected: Vec<_> = bought.iter().map(OrderRow::of).collect();
            assert_eq!(stored(&app, &sale).await, expected);

            let number: i32 = sqlx::query_scalar("SELECT number FROM sales WHERE id = $1")
                .bind(sale.parse::<Uuid>().unwrap())
                .fetch_one(&mut sql)
                .await
                .unwrap();
            let key = format!("{{p0}}:{}", key.replace('N', &number.to_string()));
            let done = if overwritten {
                wire.run(&["SET", &key, "x"]).await
            } else {
                wire.run(&["DEL", &key]).await
            };
            assert!(["OK", "1"].contains(&done.as_str()));

            // In one call with those of another sale: nothing of the damaged round is sold, until
            // it has been made anew from what is stored.
            let mut requests = strangers(&app, &sale, 8);
            requests.extend(buyers.map(|buyer| app.purchase(&sale, buyer, "k", one)));
            requests.extend(strangers(&app, &other, 8));
            for answer in crowd(requests).await {
                if answer.status != 201 {
                    assert_not_applied(&answer);
                } else if answer.json()["sale_id"] == json!(other) {
                    others += 1;
                }
            }
            let doors = [app.door()];
            for (buyer, first) in buyers.into_iter().zip(&bought) {
                let again = insist(app.purchase(&sale, buyer, "k", one), &doors).await;
                assert_eq!(again.header("idempotency-replayed"), Some("true"));
                assert_eq!(again.expect(201).json()["seq"], first["seq"], "{key}");
            }
            for request in strangers(&app, &sale, 12) {
                insist(request, &doors).await;
            }
            let now = stored(&app, &sale).await;
            assert_eq!((now.len(), &now[..2]), (10, &expected[..]), "{key}");
        }
    }
    assert_eq!(stored(&app, &other).await.len(), others);
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_round_is_made_anew_with_what_only_the_journal_has() {
    let app = App::start().await;
    let sale = drop_of(&app, 10).await;
    let (again_stored, first_stored) = bought(strangers(&app, &sale, 2)).await;
    assert_eq!(stored(&app, &sale).await.len(), 2);
    let mut sql = lock_orders(&app, "SHARE").await;
    let (again, first) = bought(strangers(&app, &sale, 3)).await;
    let number: i32 = sqlx::query_scalar("SELECT number FROM sales WHERE id = $1")
        .bind(sale.parse::<Uuid>().unwrap())
        .fetch_one(&mut sql)
        .await
        .unwrap();
    let mut wire = Wire::connect(&app.redis).await;
    let orders = format!("{{p0}}:sale:{number}:orders");
    assert_eq!(wire.run(&["DEL", &orders]).await, "1");

    let doors = [app.door()];
    let retries = again_stored.into_iter().chain(again);
    let firsts = first_stored.into_iter().chain(first);
    let mut answers = Vec::new();
    for (request, first) in retries.zip(firsts) {
        assert_replays(&insist(request, &doors).await, &first);
        answers.push(first);
    }
    assert_eq!(rows(&app, &sale).await.len(), 2);
    for request in strangers(&app, &sale, 12) {
        answers.push(insist(request, &doors).await);
    }
    sqlx::raw_sql("COMMIT").execute(&mut sql).await.unwrap();
    assert_sold(&app, &sale, &answers, 10).await;
    app.finish().await;
}

pub(crate) fn copy_files(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// From now on nothing is stored, as long as this lives. In `SHARE` mode what is stored can be read,
/// in `ACCESS EXCLUSIVE` mode nothing can.
pub(crate) async fn lock_orders(app: &App, mode: &str) -> PgConnection {
    let mut lock = sql(app).await;
    let locking = format!("BEGIN; LOCK TABLE orders IN {mode} MODE");
    sqlx::raw_sql(AssertSqlSafe(locking))
        .execute(&mut lock)
        .await
        .unwrap();
    lock
}

/// `/readyz` says that the partition cannot sell.
pub(crate) async fn until_fenced(app: &App) {
    let fenced = |answer: &Answer| {
        answer.status == 503
            && answer.json()["checks"]
                .as_array()
                .unwrap()
                .iter()
                .any(|check| {
                    let detail = check["detail"].as_str().unwrap_or_default();
                    check["name"] == "partitions" && check["ok"] == false && detail.contains("p0")
                })
    };
    app.until("/readyz", fenced).await;
}

/// Sends requests one after the other, and gives each with its answer.
async fn bought(requests: Vec<RequestBuilder>) -> (Vec<RequestBuilder>, Vec<Answer>) {
    let mut answers = Vec::new();
    for request in &requests {
        answers.push(send(request.try_clone().unwrap()).await.expect(201));
    }
    (requests, answers)
}

/// The epochs in which the orders of a sale were accepted, oldest first.
async fn epochs(app: &App, sale: &str) -> Vec<i32> {
    sqlx::query_scalar("SELECT epoch FROM orders WHERE sale_id = $1 ORDER BY epoch, seq")
        .bind(sale.parse::<Uuid>().unwrap())
        .fetch_all(&mut sql(app).await)
        .await
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_of_the_past_is_made_anew_before_it_sells() {
    let mut app = App::start().await;
    let sale = drop_of(&app, 10).await;
    let aof = app.redis.dir().join("appendonlydir");
    let past = app.redis.dir().join("past");
    // Every write is in the file before it is answered.
    copy_files(&aof, &past);
    let (again, bought) = bought(strangers(&app, &sale, 10)).await;
    assert_sold(&app, &sale, &bought, 10).await;

    app.redis.server.kill().await;
    fs::remove_dir_all(&aof).unwrap();
    copy_files(&past, &aof);
    app.redis.server.restart().await.unwrap();
    // Its stock is untouched, but none of it is for sale: all ten have been sold.
    for answer in crowd(strangers(&app, &sale, 50)).await {
        assert_not_applied(&answer);
    }
    let doors = [app.door()];
    for request in strangers(&app, &sale, 20) {
        refused(&insist(request, &doors).await, 409, "sold_out");
    }
    for (request, first) in again.into_iter().zip(&bought) {
        assert_replays(&insist(request, &doors).await, first);
    }
    assert_sold(&app, &sale, &bought, 10).await;
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_emptied_redis_is_made_anew_from_what_is_stored() {
    let app = App::start().await;
    let sale = drop_of(&app, 10).await;
    let other = drop_of(&app, 10).await;
    let restock = |app: &App| {
        app.operate(Method::POST, &format!("/v1/sales/{other}/restock"))
            .header("Idempotency-Key", "more")
            .json(&json!({"units": 5}))
    };
    send(restock(&app)).await.expect(200);
    let (again, bought) = bought(strangers(&app, &sale, 5)).await;
    let expected: Vec<_> = acceptances(&bought).iter().map(OrderRow::of).collect();
    assert_eq!(stored(&app, &sale).await, expected);
    let returned = id(&bought[0].json()).to_owned();
    let cancel = app.operate(Method::POST, &format!("/v1/orders/{returned}/cancel"));
    send(cancel).await.expect(200);
    app.audit(&sale).await;
    let before = epochs(&app, &sale).await;

    assert_eq!(
        Wire::connect(&app.redis).await.run(&["FLUSHALL"]).await,
        "OK"
    );
    let doors = [app.door()];
    let mut answers = Vec::new();
    for request in strangers(&app, &sale, 20) {
        answers.push(insist(request, &doors).await);
    }
    // Five were sold and one of them came back: six are left.
    assert_eq!(acceptances(&answers).len(), 6);
    for (request, first) in again.into_iter().zip(&bought) {
        assert_replays(&insist(request, &doors).await, first);
    }
    let replayed = insist(restock(&app), &doors).await.expect(200);
    assert_eq!(replayed.json()["allocation"], 15);
    assert_eq!(app.audit(&sale).await["verdict"], "pass");
    let after = epochs(&app, &sale).await;
    let first = before[0];
    assert_eq!(after.iter().filter(|epoch| **epoch == first).count(), 5);
    assert_eq!(after.iter().filter(|epoch| **epoch > first).count(), 6);
    app.finish().await;
}

/// Recovery has begun to look at the partition, and then again: in between it has made up its mind.
async fn until_looked_at(sql: &mut PgConnection) {
    let mut looks = HashSet::new();
    let looking = async {
        while looks.len() < 3 {
            let at: Option<String> =
                sqlx::query_scalar("SELECT max(seen_at)::text FROM node_floors")
                    .fetch_one(&mut *sql)
                    .await
                    .unwrap();
            looks.insert(at);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, looking).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_emptied_redis_with_acceptances_that_nobody_has_sells_nothing() {
    let app = App::start().await;
    let sale = drop_of(&app, 10).await;
    let mut sql = lock_orders(&app, "ACCESS EXCLUSIVE").await;
    bought(strangers(&app, &sale, 1)).await;
    // The writer has read the first, and waits for the lock.
    let mut other = self::sql(&app).await;
    let blocked = async {
        let waiting = "SELECT count(*) FROM pg_stat_activity
            WHERE wait_event_type = 'Lock' AND datname = current_database()";
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
    bought(strangers(&app, &sale, 5)).await;
    assert_eq!(
        Wire::connect(&app.redis).await.run(&["FLUSHALL"]).await,
        "OK"
    );
    for answer in crowd(strangers(&app, &sale, 50)).await {
        assert_not_applied(&answer);
    }
    sqlx::raw_sql("COMMIT").execute(&mut sql).await.unwrap();
    until_looked_at(&mut sql).await;
    until_fenced(&app).await;
    for answer in crowd(strangers(&app, &sale, 50)).await {
        assert_not_applied(&answer);
    }
    // A node that has seen nothing of it does not know better.
    let node = app.node_at(app.endpoints(), Role::ALL).await;
    let requests = strangers(&app, &sale, 50);
    for answer in crowd(requests.into_iter().map(|request| node.ask(request))).await {
        assert_not_applied(&answer);
    }
    node.stop().await;
    assert_eq!(rows(&app, &sale).await.len(), 1);
    app.abandon().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_agree_on_what_was_sold_before_redis_is_made_anew() {
    let app = App::start().await;
    let node = app.node().await;
    let sale = drop_of(&app, 100).await;
    let requests = strangers(&app, &sale, 40);
    let split = requests.into_iter().enumerate().map(|(turn, request)| {
        if turn % 2 == 0 {
            request
        } else {
            node.ask(request)
        }
    });
    let mut answers = crowd(split).await;
    assert_eq!(acceptances(&answers).len(), 40);
    stored(&app, &sale).await;
    assert_eq!(
        Wire::connect(&app.redis).await.run(&["FLUSHALL"]).await,
        "OK"
    );
    let doors = [app.door(), node.door()];
    let crowd = Crowd::send(strangers(&app, &sale, 100), doors.to_vec());
    answers.extend(crowd.done().await);
    assert_sold(&app, &sale, &answers, 100).await;
    node.stop().await;
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn selling_goes_on_while_postgresql_is_locked() {
    let app = App::start().await;
    let sale = drop_of(&app, 60).await;
    let mut sql = lock_orders(&app, "ACCESS EXCLUSIVE").await;
    let answers = crowd(strangers(&app, &sale, 100)).await;
    let accepted = acceptances(&answers);
    assert_eq!(accepted.len(), 60);
    for order in &accepted {
        let path = format!("/v1/orders/{}", id(order));
        let order = send(app.operate(Method::GET, &path)).await.expect(200);
        assert_eq!(order.json()["stored"], false);
    }
    assert_eq!(app.view(&sale).await["sold"], 60);
    sqlx::raw_sql("COMMIT").execute(&mut sql).await.unwrap();
    assert_sold(&app, &sale, &answers, 60).await;
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_position_set_back_by_hand_loses_and_doubles_nothing() {
    let app = App::start().await;
    let sale = drop_of(&app, 200).await;
    let mut sql = sql(&app).await;
    let mut crowd = Crowd::send(strangers(&app, &sale, 300), vec![app.door()]);
    let back = "UPDATE journal_positions SET position = greatest(1, position / 2)";
    for served in [50, 100, 150] {
        crowd.served(served).await;
        sqlx::query(back).execute(&mut sql).await.unwrap();
    }
    let answers = crowd.done().await;
    let path = format!("/v1/sales/{sale}/audit");
    let passes = |answer: &Answer| answer.status == 200 && answer.json()["verdict"] == "pass";
    app.until(&path, passes).await;
    assert_sold(&app, &sale, &answers, 200).await;

    // Also when nobody buys any more.
    sqlx::query(back).execute(&mut sql).await.unwrap();
    app.until(&path, passes).await;
    assert_sold(&app, &sale, &answers, 200).await;
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_postgresql_forgets_is_read_again() {
    let app = App::start().await;
    let sale = drop_of(&app, 30).await;
    let mut sql = sql(&app).await;
    let mut answers = crowd(strangers(&app, &sale, 10)).await;
    stored(&app, &sale).await;
    let remember = "CREATE TEMPORARY TABLE old_rounds AS SELECT * FROM rounds;
        CREATE TEMPORARY TABLE old_positions AS SELECT * FROM journal_positions";
    sqlx::raw_sql(remember).execute(&mut sql).await.unwrap();
    answers.extend(crowd(strangers(&app, &sale, 50)).await);
    assert_sold(&app, &sale, &answers, 30).await;

    // As after a failover to a replica that was behind; and nobody buys any more.
    let forget = "BEGIN;
        DELETE FROM orders WHERE pseq > (SELECT position FROM old_positions);
        DELETE FROM rounds; INSERT INTO rounds SELECT * FROM old_rounds;
        DELETE FROM journal_positions; INSERT INTO journal_positions SELECT * FROM old_positions;
        COMMIT";
    sqlx::raw_sql(forget).execute(&mut sql).await.unwrap();
    let whole = async {
        while rows(&app, &sale).await.len() < 30 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, whole).await.unwrap();
    assert_sold(&app, &sale, &answers, 30).await;
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_applications_sell_one_stock() {
    let app = App::start().await;
    let node = app.node().await;
    let sale = drop_of(&app, 100).await;
    let requests = strangers(&app, &sale, 300);
    let again: Vec<_> = requests
        .iter()
        .map(|request| request.try_clone().unwrap())
        .collect();
    // Everybody at once, every other one at the other node.
    let split = requests.into_iter().enumerate().map(|(turn, request)| {
        if turn % 2 == 0 {
            request
        } else {
            node.ask(request)
        }
    });
    let sending: Vec<_> = split.map(|request| tokio::spawn(send(request))).collect();
    let mut answers = Vec::new();
    for answer in sending {
        answers.push(answer.await.unwrap());
    }
    assert_sold(&app, &sale, &answers, 100).await;

    // Each node replays what the other one accepted, and shows it.
    for (turn, (request, first)) in again.into_iter().zip(&answers).enumerate() {
        if first.status == 201 {
            let there = turn % 2 == 0;
            let elsewhere = |request| if there { node.ask(request) } else { request };
            assert_replays(&send(elsewhere(request)).await, first);
            let location = first.header("location").unwrap();
            let order = send(elsewhere(app.operate(Method::GET, location))).await;
            assert_eq!(order.expect(200).json()["id"], first.json()["id"]);
        }
    }

    // What is given back at one node is sold at the other.
    let last = acceptances(&answers).pop().unwrap();
    let path = format!("/v1/orders/{}/cancel", id(&last));
    let cancelled = node.ask(app.operate(Method::POST, &path));
    send(cancelled).await.expect(200);
    let bought = async {
        while app.buy(&sale, clock::new_id(), "k", 1).await.status != 201 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, bought).await.unwrap();
    node.stop().await;
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_restart_one_after_the_other_under_a_crowd() {
    let mut app = App::start().await;
    let node = app.node().await;
    let sale = drop_of(&app, 150).await;
    let doors = vec![app.door(), node.door()];
    let mut crowd = Crowd::send(strangers(&app, &sale, 400), doors);
    crowd.served(30).await;
    app.stop().await;
    app.run().await;
    crowd.served(80).await;
    node.stop().await;
    let answers = crowd.done().await;
    assert_sold(&app, &sale, &answers, 150).await;
    app.finish().await;
}
