//! What an acceptance survives: replicas that hang, primaries that are gone, a PostgreSQL that is
//! away, settings that change in the middle of a sale. Nothing is told before it is as durable as
//! its sale promises, and nothing is sold while the stores cannot keep the promise.

use std::collections::HashSet;

use futures::future::join_all;
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Executor};
use stockade::{
    clock,
    embedded::{PostgresOptions, PostgresServer},
};
use tempfile::TempDir;
use tokio::time::timeout;
use uuid::Uuid;

use super::{
    power::Load,
    replica::{Pair, until_info},
    rounds_end::{AT_ONCE, Bought, archived, close, second_round},
    selling::{OrderRow, acceptances, assert_replays, refused, rows, stored, strangers, uuid},
    support::{
        Redis,
        app::{Answer, App, PATIENCE, crowd, id, insist, send, sql},
        open_dir,
        wire::Wire,
    },
};

/// A primary that refuses to write without its replica, and an application that waits for it.
async fn pair() -> Pair {
    let mut pair = Pair::without_node(&[("STOCKADE_REPLICAS", "1")]).await;
    let mut primary = Wire::connect(&pair.app.redis).await;
    for (name, value) in [
        ("min-replicas-to-write", "1"),
        ("min-replicas-max-lag", "5"),
    ] {
        primary.run(&["CONFIG", "SET", name, value]).await;
    }
    until_info(&mut primary, "min_slaves_good_slaves:1").await;
    pair.app.run().await;
    pair
}

/// A PostgreSQL that really syncs, as in production.
struct Postgres {
    server: PostgresServer,
    _dir: TempDir,
}

impl Postgres {
    async fn start() -> Self {
        let dir = open_dir();
        let on = |name: &str| (name.to_owned(), "on".to_owned());
        let options = PostgresOptions {
            throwaway: true,
            settings: vec![
                on("fsync"),
                on("full_page_writes"),
                on("synchronous_commit"),
            ],
            ..PostgresOptions::new(dir.path().join("postgres"))
        };
        Self {
            server: PostgresServer::start(options).await.unwrap(),
            _dir: dir,
        }
    }
}

/// An application on it.
async fn app_on(postgres: &Postgres) -> App {
    app_with(postgres, &[]).await
}

async fn app_with(postgres: &Postgres, settings: &[(&str, &str)]) -> App {
    let mut app = App::without_node(settings).await;
    app.database_url = postgres.server.url().clone();
    app.run().await;
    until_durability(&app, true, "fsync").await;
    app
}

/// A sale with this mode, of which every buyer gets one unit.
async fn sale_with(app: &App, durability: &str, units: u64) -> String {
    let terms = json!({ "allocation": units, "per_buyer_limit": 1, "durability": durability });
    let sale = app.sale(terms).await;
    assert_eq!(sale["durability"], durability);
    id(&sale).to_owned()
}

/// Waits until `/readyz` says this of durability, and still wants traffic.
async fn until_durability(app: &App, ok: bool, says: &str) {
    let said = |answer: &Answer| {
        answer.status == 200
            && answer.json()["checks"]
                .as_array()
                .unwrap()
                .iter()
                .any(|check| {
                    let detail = check["detail"].as_str().unwrap_or_default();
                    check["name"] == "durability" && check["ok"] == ok && detail.contains(says)
                })
    };
    app.until("/readyz", said).await;
}

/// Whether the metrics say this of sales with a durability.
async fn durable(app: &App, mode: &str, value: u8) -> bool {
    let line = format!("stockade_engine_durable{{partition=\"0\",durability=\"{mode}\"}} {value}");
    app.get("/metrics").await.text.contains(&line)
}

/// Nothing is sold, and the answer says what to change.
#[track_caller]
pub(crate) fn assert_lacks(answer: &Answer, says: &str) {
    let problem = refused(answer, 503, "not_durable");
    assert_eq!(problem["outcome"], "not_applied", "{answer:?}");
    assert!(answer.header("retry-after").is_some());
    let lack = problem["lack"].as_str().unwrap();
    assert!(lack.contains(says), "{lack}");
}

/// It may have been done, or may be lost.
#[track_caller]
fn assert_unknown(answer: &Answer) {
    let problem = refused(answer, 503, "unavailable");
    assert_eq!(problem["outcome"], "unknown", "{answer:?}");
    assert!(answer.header("retry-after").is_some());
}

fn again(requests: &[RequestBuilder]) -> Vec<RequestBuilder> {
    requests
        .iter()
        .map(|request| request.try_clone().unwrap())
        .collect()
}

/// Whether a Redis has an order of the first or a later sale.
async fn has(wire: &mut Wire, sale: u32, order: Uuid) -> bool {
    let script = "local id = string.gsub(ARGV[1], '..', function(hex)
                    return string.char(tonumber(hex, 16))
                  end)
                  return redis.call('HEXISTS', KEYS[1], id)";
    let key = format!("{{p0}}:sale:{sale}:orders");
    wire.run(&["EVAL", script, "1", &key, &order.simple().to_string()])
        .await
        == "1"
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sale_of_each_mode_says_what_its_orders_survive() {
    let postgres = Postgres::start().await;
    let mut pair = Pair::without_node(&[("STOCKADE_REPLICAS", "1")]).await;
    let mut primary = Wire::connect(&pair.app.redis).await;
    for (name, value) in [
        ("min-replicas-to-write", "1"),
        ("min-replicas-max-lag", "5"),
    ] {
        primary.run(&["CONFIG", "SET", name, value]).await;
    }
    until_info(&mut primary, "min_slaves_good_slaves:1").await;
    pair.app.database_url = postgres.server.url().clone();
    pair.app.run().await;
    let app = &pair.app;
    until_durability(app, true, "fsync").await;
    for (mode, durability) in [
        ("default", "fsync"),
        ("replicated", "replicated"),
        ("committed", "committed"),
    ] {
        let sale = sale_with(app, mode, 30).await;
        let requests = strangers(app, &sale, 60);
        let retries = again(&requests);
        let answers = join_all(requests.into_iter().map(send)).await;
        let bodies = acceptances(&answers);
        assert_eq!(bodies.len(), 30);
        for body in &bodies {
            assert_eq!(body["durability"], durability);
            assert!(body["receipt"].is_string());
        }
        for (retry, first) in retries.into_iter().zip(&answers) {
            if first.status == 201 {
                assert_replays(&send(retry).await, first);
            } else {
                refused(first, 409, "sold_out");
                refused(&send(retry).await, 409, "sold_out");
            }
        }
        let path = format!("/v1/orders/{}", id(&bodies[0]));
        let order = send(app.operate(Method::GET, &path))
            .await
            .expect(200)
            .json();
        assert_eq!(order["durability"], durability);
        let path = format!("/v1/orders?sale_id={sale}");
        let rows = stored(app, &sale).await;
        assert_eq!(rows, bodies.iter().map(OrderRow::of).collect::<Vec<_>>());
        for order in app.pages(&path).await {
            assert_eq!(order["durability"], durability);
        }
    }
    pair.app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_gets_nothing_makes_no_201() {
    let pair = pair().await;
    let app = &pair.app;
    let sale = sale_with(app, "replicated", 30).await;
    let other = sale_with(app, "default", 10).await;
    for answer in crowd(strangers(app, &sale, 10)).await {
        answer.expect(201);
    }
    // It goes on saying that it is there, so that Redis goes on writing.
    pair.cable.hold();
    let requests = strangers(app, &sale, 20);
    for attempt in ["first", "retry"] {
        for answer in crowd(again(&requests)).await {
            assert_unknown(&answer);
        }
        let sold = &app.view(&sale).await["sold"];
        assert_eq!(sold, 30, "{attempt}: it was not even accepted");
    }
    // A refusal promises nothing.
    refused(
        &send(strangers(app, &sale, 1).remove(0)).await,
        409,
        "sold_out",
    );
    // Whoever does not wait for replicas is not kept waiting.
    for answer in crowd(strangers(app, &other, 10)).await {
        assert_eq!(answer.expect(201).json()["durability"], "fsync");
    }
    pair.cable.release();
    let doors = [app.door()];
    for request in again(&requests) {
        let answer = insist(request, &doors).await.expect(201);
        assert_eq!(answer.header("idempotency-replayed"), Some("true"));
    }
    pair.app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promoted_replica_has_every_order_that_was_told() {
    let pair = pair().await;
    let app = &pair.app;
    let sale = sale_with(app, "replicated", 100_000).await;
    let other = sale_with(app, "default", 100_000).await;
    let mut load = Load::on(app, &sale);
    load.more(100).await;
    pair.cable.hold();
    // Told, and lost with the primary: that is what the other mode is for.
    let fsync = acceptances(&crowd(strangers(app, &other, 20)).await);
    assert_eq!(fsync.len(), 20);
    app.redis.server.kill().await;
    let told = load.stop().await;
    // Nobody is led to it: PostgreSQL may have what it lacks, and it would be made anew.
    pair.cable.cut();
    let mut replica = pair.at_replica().await;
    replica.run(&["REPLICAOF", "NO", "ONE"]).await;
    assert!(told.accepted.len() >= 100);
    for body in &told.accepted {
        assert!(
            has(&mut replica, 1, uuid(&body["id"])).await,
            "lost: {body}"
        );
    }
    let mut lost = 0;
    for body in &fsync {
        lost += usize::from(!has(&mut replica, 2, uuid(&body["id"])).await);
    }
    assert_eq!(lost, 20, "the replica was not behind");
    pair.app.abandon().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_that_does_not_insist_on_its_replicas_sells_nothing_replicated() {
    let pair = pair().await;
    let app = &pair.app;
    let sale = sale_with(app, "replicated", 30).await;
    let other = sale_with(app, "default", 30).await;
    let mut primary = Wire::connect(&app.redis).await;
    for (name, bad, good, says) in [
        (
            "min-replicas-to-write",
            "0",
            "1",
            "min-replicas-to-write is 0",
        ),
        (
            "min-replicas-max-lag",
            "6",
            "5",
            "min-replicas-max-lag is 6",
        ),
    ] {
        primary.run(&["CONFIG", "SET", name, bad]).await;
        until_durability(app, false, says).await;
        for answer in crowd(strangers(app, &sale, 5)).await {
            assert_lacks(&answer, says);
        }
        for answer in crowd(strangers(app, &other, 5)).await {
            answer.expect(201);
        }
        primary.run(&["CONFIG", "SET", name, good]).await;
        for request in strangers(app, &sale, 5) {
            insist(request, &[app.door()]).await.expect(201);
        }
    }
    pair.app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_replicas_to_wait_for_nothing_is_sold_replicated() {
    let app = App::start().await;
    let sale = sale_with(&app, "replicated", 5).await;
    for answer in crowd(strangers(&app, &sale, 5)).await {
        assert_lacks(&answer, "STOCKADE_REPLICAS is 0");
    }
    let lack = app.view(&sale).await["lack"].clone();
    assert!(lack.as_str().unwrap().contains("STOCKADE_REPLICAS is 0"));
    assert!(durable(&app, "default", 1).await && durable(&app, "replicated", 0).await);
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn settings_that_keep_nothing_stop_every_sale_until_they_are_mended() {
    let app = App::start().await;
    let sale = sale_with(&app, "default", 1_000_000).await;
    let first = app.purchase(&sale, clock::new_id(), "k", r#"{"quantity":1}"#);
    let told = send(first.try_clone().unwrap()).await.expect(201);
    let mut wire = Wire::connect(&app.redis).await;
    for (name, bad, good, says) in [
        ("appendonly", "no", "yes", "appendonly is no"),
        ("appendfsync", "no", "always", "appendfsync is no"),
        (
            "no-appendfsync-on-rewrite",
            "yes",
            "no",
            "no-appendfsync-on-rewrite is yes",
        ),
    ] {
        wire.run(&["CONFIG", "SET", name, bad]).await;
        until_durability(&app, false, says).await;
        for answer in crowd(strangers(&app, &sale, 5)).await {
            assert_lacks(&answer, says);
        }
        // What was told is not taken back, and not told anew either.
        assert_lacks(&send(first.try_clone().unwrap()).await, says);
        wire.run(&["CONFIG", "SET", name, good]).await;
        for request in strangers(&app, &sale, 5) {
            insist(request, &[app.door()]).await.expect(201);
        }
        assert_replays(&send(first.try_clone().unwrap()).await, &told);
    }
    wire.run(&["CONFIG", "SET", "appendfsync", "everysec"])
        .await;
    let buying = async {
        loop {
            let answer = send(strangers(&app, &sale, 1).remove(0)).await.expect(201);
            if answer.json()["durability"] == "fast" {
                return;
            }
        }
    };
    timeout(PATIENCE, buying).await.unwrap();
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_does_not_show_its_settings_is_believed_only_when_told() {
    let renamed = Redis::start_with(|options| {
        let rename = ("rename-command CONFIG".to_owned(), String::new());
        options.settings.push(rename);
    })
    .await;
    let forbidden = Redis::start().await;
    let mut wire = Wire::connect(&forbidden).await;
    wire.run(&["ACL", "SETUSER", "default", "-config"]).await;
    for redis in [renamed, forbidden] {
        let mut app = App::start_on(redis, &[]).await;
        let sale = sale_with(&app, "default", 10).await;
        until_durability(&app, false, "STOCKADE_REDIS_DURABILITY").await;
        for answer in crowd(strangers(&app, &sale, 5)).await {
            assert_lacks(&answer, "STOCKADE_REDIS_DURABILITY");
        }
        app.stop().await;
        for said in ["fast", "fsync"] {
            app.set("STOCKADE_REDIS_DURABILITY", said);
            app.run().await;
            for answer in crowd(strangers(&app, &sale, 5)).await {
                assert_eq!(answer.expect(201).json()["durability"], said);
            }
            // Not all is well: PostgreSQL of the tests does not sync.
            until_durability(&app, false, &format!("{said}, not verified")).await;
            app.stop().await;
        }
        app.run().await;
        app.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_postgresql_that_does_not_sync_sells_nothing_committed() {
    let app = App::start().await;
    let sale = sale_with(&app, "committed", 5).await;
    let other = sale_with(&app, "default", 5).await;
    until_durability(&app, false, "PostgreSQL has fsync off").await;
    assert!(durable(&app, "default", 1).await && durable(&app, "committed", 0).await);
    assert_eq!(app.view(&other).await.get("lack"), None);
    for answer in crowd(strangers(&app, &sale, 5)).await {
        assert_lacks(&answer, "PostgreSQL has fsync off");
    }
    for answer in crowd(strangers(&app, &other, 5)).await {
        answer.expect(201);
    }
    app.finish().await;
}

/// Makes each commit of orders slow enough to tell before from after.
const SLOW: &str = "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN PERFORM pg_sleep(0.2); RETURN NULL; END $$;
    CREATE TRIGGER slow BEFORE INSERT ON orders EXECUTE FUNCTION slow()";

async fn is_stored(app: &App, order: &Value) -> bool {
    sqlx::query_scalar(
        "SELECT EXISTS (SELECT FROM orders WHERE id = $1 AND durability = 'committed')",
    )
    .bind(uuid(&order["id"]))
    .fetch_one(&mut sql(app).await)
    .await
    .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_emptied_redis_takes_no_committed_order_along() {
    let postgres = Postgres::start().await;
    let app = app_on(&postgres).await;
    let sale = sale_with(&app, "committed", 60).await;
    sql(&app).await.execute(SLOW).await.unwrap();
    let mut told = Vec::new();
    for _ in 0..5 {
        for answer in crowd(strangers(&app, &sale, 5)).await {
            let body = answer.expect(201).json();
            assert_eq!(body["durability"], "committed");
            assert!(
                is_stored(&app, &body).await,
                "told before it was stored: {body}"
            );
            told.push(body);
        }
    }
    // In the middle of a crowd: whoever is not told may be lost, and whoever is told is not.
    let requests = strangers(&app, &sale, 20);
    let waiting = tokio::spawn(crowd(again(&requests)));
    let mut wire = Wire::connect(&app.redis).await;
    let accepted = async {
        while wire.ask(&["HGET", "{p0}:round:1.1", "seq"]).await[0] == "25" {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, accepted).await.unwrap();
    wire.run(&["FLUSHALL"]).await;
    for answer in waiting.await.unwrap() {
        if answer.status == 201 {
            told.push(answer.json());
        } else {
            refused(&answer, 503, "unavailable");
        }
    }
    let rows: HashSet<_> = rows(&app, &sale).await.into_iter().collect();
    for body in &told {
        assert!(rows.contains(&OrderRow::of(body)), "lost: {body}");
    }
    app.abandon().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_committed_order_that_has_left_redis_is_told_again() {
    let postgres = Postgres::start().await;
    let mut app = app_with(&postgres, &AT_ONCE).await;
    let sale = sale_with(&app, "committed", 3).await;
    let bought = Bought::some(&app, &sale, 3).await;
    close(&app, &sale).await;
    let mut sql = sql(&app).await;
    archived(&mut sql, &sale).await;
    for bought in &bought {
        bought.replays(&app, &sale).await;
    }
    app.stop().await;
    second_round(&mut sql, 3).await;
    app.run().await;
    until_durability(&app, true, "fsync").await;
    app.until(&format!("/v1/sales/{sale}"), |answer| answer.status == 200)
        .await;
    for bought in &bought {
        bought.replays(&app, &sale).await;
    }
    // What the next round sells is waited for as before.
    sql.execute(SLOW).await.unwrap();
    for answer in crowd(strangers(&app, &sale, 3)).await {
        let body = answer.expect(201).json();
        assert_eq!(body["round"], 2);
        assert!(
            is_stored(&app, &body).await,
            "told before it was stored: {body}"
        );
    }
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_postgresql_that_is_away_makes_no_committed_201() {
    let mut postgres = Postgres::start().await;
    let app = app_on(&postgres).await;
    let sale = sale_with(&app, "committed", 1_000).await;
    let mut load = Load::on(&app, &sale);
    load.more(50).await;
    postgres.server.kill().await;
    let told = load.told();
    // First in doubt, because it was accepted; then not even let in.
    let refusing = async {
        loop {
            let answer = send(strangers(&app, &sale, 1).remove(0)).await;
            let problem = refused(&answer, 503, "unavailable");
            if problem["outcome"] == "not_applied" {
                assert!(answer.header("retry-after").is_some());
                return;
            }
        }
    };
    timeout(PATIENCE, refusing).await.unwrap();
    assert!(
        load.told() <= told + 16,
        "somebody was told while nothing was stored"
    );
    postgres.server.restart().await.unwrap();
    load.more(50).await;
    let bought = load.stop().await;
    // Strangers who were let in before anybody knew have their order, and nobody told them.
    let rows: HashSet<_> = stored(&app, &sale).await.into_iter().collect();
    for body in &bought.accepted {
        assert!(rows.contains(&OrderRow::of(body)), "lost: {body}");
    }
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writer_that_stalls_leaves_few_in_doubt_and_refuses_the_others() {
    let postgres = Postgres::start().await;
    let app = app_on(&postgres).await;
    let sale = sale_with(&app, "committed", 100).await;
    let other = sale_with(&app, "default", 10).await;
    let mut lock = sql(&app).await;
    lock.execute("BEGIN; LOCK TABLE orders IN EXCLUSIVE MODE")
        .await
        .unwrap();
    let first = strangers(&app, &sale, 10);
    for answer in crowd(again(&first)).await {
        assert_unknown(&answer);
    }
    let sold = app.view(&sale).await["sold"].clone();
    assert_eq!(sold, 10);
    // Nothing has been stored since they came: nobody is let in any more, and none is accepted.
    for answer in crowd(strangers(&app, &sale, 10)).await {
        let problem = refused(&answer, 503, "unavailable");
        assert_eq!(problem["outcome"], "not_applied");
        assert!(answer.header("retry-after").is_some());
    }
    assert_eq!(app.view(&sale).await["sold"], sold);
    for answer in crowd(strangers(&app, &other, 10)).await {
        answer.expect(201);
    }
    lock.execute("COMMIT").await.unwrap();
    let doors = [app.door()];
    for request in again(&first) {
        let answer = insist(request, &doors).await.expect(201);
        assert_eq!(answer.header("idempotency-replayed"), Some("true"));
        assert!(is_stored(&app, &answer.json()).await);
    }
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_that_postgresql_refuses_is_never_told_as_committed() {
    let postgres = Postgres::start().await;
    let app = app_on(&postgres).await;
    let terms = json!({ "allocation": 100, "per_buyer_limit": 10, "durability": "committed" });
    let sale = app.sale(terms).await;
    let sale = id(&sale);
    sql(&app)
        .await
        .execute("ALTER TABLE orders ADD CONSTRAINT poison CHECK (quantity <> 7)")
        .await
        .unwrap();
    let buyer = clock::new_id();
    for _ in 0..2 {
        assert_unknown(&app.buy(sale, buyer, "k", 7).await);
    }
    // Others go on, those before and those after it.
    for _ in 0..3 {
        let body = app
            .buy(sale, clock::new_id(), "k", 1)
            .await
            .expect(201)
            .json();
        assert!(is_stored(&app, &body).await);
    }
    let letters: i64 = sqlx::query_scalar(AssertSqlSafe("SELECT count(*) FROM dead_letters"))
        .fetch_one(&mut sql(&app).await)
        .await
        .unwrap();
    assert_eq!(letters, 1);
    app.abandon().await;
}
