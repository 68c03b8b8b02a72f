//! The end of a round: settled, certified, archived, and answered for ever after.

use reqwest::Method;
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use sqlx::PgConnection;
use stockade::{clock, ops::certificate};
use uuid::Uuid;

use super::{
    embedded::redis,
    faults::lock_orders,
    selling::ask,
    support::app::{Answer, App, PATIENCE, crowd, id, insist, send, sql},
};

/// A round ends as soon as it is closed.
pub(crate) const AT_ONCE: [(&str, &str); 2] = [
    ("STOCKADE_SETTLE_AFTER", "0"),
    ("STOCKADE_ARCHIVE_AFTER", "0"),
];

/// The hash over all orders of a round, as anybody can compute it.
const HASH: &str = "SELECT encode(sha256(convert_to(coalesce(string_agg(concat_ws(' ',
        id, buyer_id, epoch, seq, pseq, quantity, unit_price, currency, status, accepted_as,
        durability, receipt_key, (extract(epoch FROM accepted_at) * 1000)::bigint,
        encode(fingerprint, 'hex'),
        CASE WHEN hold_ms > 0 OR refunded > 0 OR returned > 0 AND status <> 'cancelled'
             THEN concat_ws(' ', hold_ms, extended_ms, returned, refunded) END) || E'\\n', '' ORDER BY epoch, seq), ''), 'UTF8')), 'hex')
    FROM orders WHERE sale = $1 AND round = $2";

/// A year in seconds: no test is that patient.
const NEVER: &str = "31536000";

/// What buyers got, to be held against what they get later.
pub(crate) struct Bought {
    buyer: Uuid,
    key: String,
    answer: Answer,
}

impl Bought {
    pub(crate) async fn some(app: &App, sale: &str, buyers: usize) -> Vec<Self> {
        let mut bought = Vec::new();
        for at in 0..buyers {
            let (buyer, key) = (clock::new_id(), format!("key-{at}"));
            let answer = app.buy(sale, buyer, &key, 1).await.expect(201);
            bought.push(Self { buyer, key, answer });
        }
        bought
    }

    fn order(&self) -> Value {
        self.answer.json()
    }

    /// The same request again: the same bytes, and nothing new.
    pub(crate) async fn replays(&self, app: &App, sale: &str) {
        let again = app.buy(sale, self.buyer, &self.key, 1).await.expect(201);
        assert_eq!(again.text, self.answer.text);
        assert_eq!(again.header("idempotency-replayed"), Some("true"));
        assert_eq!(again.header("location"), self.answer.header("location"));
        let other = app.buy(sale, self.buyer, &self.key, 2).await.expect(422);
        assert_eq!(other.json()["code"], "idempotency_key_mismatch");
    }
}

fn certificate_path(sale: &str) -> String {
    format!("/v1/sales/{sale}/rounds/1/certificate")
}

async fn certificate(app: &App, sale: &str) -> Value {
    app.until(&certificate_path(sale), |answer| answer.status == 200)
        .await
        .json()
}

async fn operate(app: &App, path: &str, body: Option<Value>) -> Answer {
    let request = app
        .operate(Method::POST, path)
        .header("Idempotency-Key", clock::new_id().to_string());
    send(match body {
        Some(body) => request.json(&body),
        None => request,
    })
    .await
}

pub(crate) async fn close(app: &App, sale: &str) {
    operate(app, &format!("/v1/sales/{sale}/close"), None)
        .await
        .expect(200);
}

async fn cancel(app: &App, order: &Value) -> Answer {
    operate(app, &format!("/v1/orders/{}/cancel", id(order)), None).await
}

/// Waits until PostgreSQL says that the round has left Redis.
pub(crate) async fn archived(sql: &mut PgConnection, sale: &str) {
    let archived = async {
        loop {
            let done: bool = sqlx::query_scalar(
                "SELECT archived_at IS NOT NULL FROM rounds
                 JOIN sales ON number = rounds.sale WHERE id = $1 AND rounds.round = 1",
            )
            .bind(sale.parse::<Uuid>().unwrap())
            .fetch_one(&mut *sql)
            .await
            .unwrap();
            if done {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, archived).await.unwrap();
}

/// Everything that can be read of a sale and its orders.
async fn readings(app: &App, sale: &str, orders: &[Bought]) -> Vec<Value> {
    let mut readings = app
        .pages(&format!("/v1/sales/{sale}/leaderboard?round=1"))
        .await;
    readings.extend(app.pages(&format!("/v1/orders?sale_id={sale}")).await);
    for bought in orders {
        let path = format!("/v1/orders/{}", id(&bought.order()));
        let answer = send(app.operate(Method::GET, &path)).await;
        readings.push(answer.expect(200).json());
    }
    let page = format!("/v1/sales/{sale}/leaderboard?limit=2");
    let first = app.get(&page).await.expect(200).json();
    let cursor = first["next_cursor"].as_str().unwrap();
    readings.push(app.get(&format!("{page}&cursor={cursor}")).await.json());
    let mut view = app.view(sale).await;
    for moving in ["server_time_ms", "seq"] {
        view.as_object_mut().unwrap().remove(moving);
    }
    readings.push(view);
    readings
}

/// What a settled round refuses, archived or not.
async fn refuses(app: &App, sale: &str, confirmed: &Value, cancelled: &Value) {
    let refused = cancel(app, confirmed).await.expect(409).json();
    assert_eq!(refused["code"], "conflict");
    assert!(refused["detail"].as_str().unwrap().contains("settled"));
    let again = cancel(app, cancelled).await.expect(200).json();
    assert_eq!(again["status"], "cancelled");
    let units = Some(json!({ "units": 1 }));
    let restock = operate(app, &format!("/v1/sales/{sale}/restock"), units).await;
    assert_eq!(restock.expect(409).json()["code"], "conflict");
    operate(app, &format!("/v1/sales/{sale}/resume"), None)
        .await
        .expect(409);
    for _ in 0..2 {
        let late = app.buy(sale, clock::new_id(), "late", 1).await.expect(409);
        assert_eq!(late.json()["code"], "closed");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_round_settles_is_certified_and_archived_and_still_answers() {
    let mut app = App::start_with(&[
        ("STOCKADE_SETTLE_AFTER", NEVER),
        ("STOCKADE_ARCHIVE_AFTER", NEVER),
    ])
    .await;
    let sale = app.sale(json!({ "allocation": 9 })).await;
    let sale = id(&sale).to_owned();
    let bought = Bought::some(&app, &sale, 7).await;
    let (confirmed, cancelled) = (bought[0].order(), bought[3].order());
    let units = Some(json!({ "units": 2 }));
    operate(&app, &format!("/v1/sales/{sale}/restock"), units)
        .await
        .expect(200);
    close(&app, &sale).await;
    // Until it settles, orders can be given back.
    cancel(&app, &cancelled).await.expect(200);
    app.get(&certificate_path(&sale)).await.expect(404);
    app.audit(&sale).await;
    let mut sql = sql(&app).await;

    app.stop().await;
    app.set("STOCKADE_SETTLE_AFTER", "0");
    app.run().await;
    let certified = certificate(&app, &sale).await;
    let body = &certified["certificate"];
    let counts = ["allocation", "remaining", "held", "sold", "seq"].map(|name| body[name].as_u64());
    // Seven orders, a restock, a close, a cancel and the settling.
    assert_eq!(counts, [11, 5, 0, 6, 11].map(Some), "{body:#}");
    let orders = ["orders", "confirmed", "cancelled"].map(|name| body[name].as_u64());
    assert_eq!(orders, [7, 6, 1].map(Some));
    assert_eq!(body["epochs"], json!([1]));
    assert_eq!(body["verdict"], "pass");
    let checks = body["checks"].as_object().unwrap();
    assert!(checks.values().all(|status| status == "pass"));
    let hash: String = sqlx::query_scalar(HASH)
        .bind(1_i32)
        .bind(1_i32)
        .fetch_one(&mut sql)
        .await
        .unwrap();
    assert_eq!(body["orders_sha256"], hash);
    let keys = app.get("/v1/certificates/keys").await.expect(200).json();
    assert_eq!(keys["keys"][0]["kid"], certified["key_id"]);
    let key = keys["keys"][0]["x"].as_str().unwrap();
    let jws = certified["jws"].as_str().unwrap();
    assert_eq!(certificate::verify(jws, key).as_ref(), Ok(body));
    verified_by_the_command(&certified, &keys).await;

    refuses(&app, &sale, &confirmed, &cancelled).await;
    bought[0].replays(&app, &sale).await;
    bought[3].replays(&app, &sale).await;
    let before = readings(&app, &sale, &bought).await;
    assert_eq!(app.audit(&sale).await["verdict"], "pass");

    app.stop().await;
    app.set("STOCKADE_ARCHIVE_AFTER", "0");
    app.run().await;
    archived(&mut sql, &sale).await;
    let url = app.redis.server.url().expose_secret().to_owned();
    for key in [
        "{p0}:sale:1:orders",
        "{p0}:round:1.1:buyers",
        "{p0}:round:1.1:board",
    ] {
        assert_eq!(redis(&url, &format!("EXISTS {key}")), ":0", "{key}");
    }
    // Twice: as it left, and verified anew after a restart of everything.
    for restart in [false, true] {
        if restart {
            app.stop().await;
            app.redis.server.kill().await;
            app.redis.server.restart().await.unwrap();
            app.run().await;
        }
        for bought in &bought {
            bought.replays(&app, &sale).await;
        }
        assert_eq!(readings(&app, &sale, &bought).await, before);
        refuses(&app, &sale, &confirmed, &cancelled).await;
        assert_eq!(app.audit(&sale).await["verdict"], "pass");
        assert_eq!(certificate(&app, &sale).await, certified);
    }
    // A row that somebody changes afterwards shows, although nobody else has it.
    sqlx::query("UPDATE orders SET quantity = 2 WHERE seq = 1")
        .execute(&mut sql)
        .await
        .unwrap();
    let audit = app.audit(&sale).await;
    let failing: Vec<_> = audit["checks"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|check| check["status"] == "fail")
        .map(|check| check["name"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(failing, ["postgres_sums", "certificate"]);
    sqlx::query("UPDATE orders SET quantity = 1 WHERE seq = 1")
        .execute(&mut sql)
        .await
        .unwrap();

    let runs = app.pages(&format!("/v1/sales/{sale}/audits")).await;
    for cause in ["settle", "certify", "archive"] {
        let run = runs.iter().find(|run| run["cause"] == cause);
        assert_eq!(run.unwrap()["verdict"], "pass", "{cause}");
    }
    let unknown = format!("/v1/sales/{}/audits", Uuid::nil());
    send(app.operate(Method::GET, &unknown)).await.expect(404);
    app.finish().await;
}

/// The command says the same, and that a changed certificate is none.
async fn verified_by_the_command(certified: &Value, keys: &Value) {
    let dir = tempfile::TempDir::new().unwrap();
    let verify = async |certificate: &Value| {
        let (file, keys_file) = (dir.path().join("certificate"), dir.path().join("keys"));
        std::fs::write(&file, certificate.to_string()).unwrap();
        std::fs::write(&keys_file, keys.to_string()).unwrap();
        let output = tokio::process::Command::new(env!("CARGO_BIN_EXE_stockade"))
            .args(["certificate", "verify"])
            .arg(&file)
            .arg("--keys")
            .arg(&keys_file)
            .kill_on_drop(true)
            .output()
            .await
            .unwrap();
        (output.status.code(), output.stdout)
    };
    let (code, said) = verify(certified).await;
    assert_eq!(code, Some(0));
    let said: Value = serde_json::from_slice(&said).unwrap();
    assert_eq!(said, certified["certificate"]);
    let mut forged = certified.clone();
    forged["certificate"]["sold"] = json!(7);
    assert_eq!(verify(&forged).await.0, Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_of_an_archived_round_replays_in_the_next_round() {
    let mut app = App::start_with(&AT_ONCE).await;
    let sale = app
        .sale(json!({ "allocation": 3, "per_buyer_limit": 3 }))
        .await;
    let sale = id(&sale).to_owned();
    let bought = Bought::some(&app, &sale, 3).await;
    close(&app, &sale).await;
    let mut sql = sql(&app).await;
    archived(&mut sql, &sale).await;
    app.stop().await;
    second_round(&mut sql, 3).await;
    app.run().await;
    app.until(&format!("/v1/sales/{sale}"), |answer| answer.status == 200)
        .await;
    for bought in &bought {
        bought.replays(&app, &sale).await;
    }
    let view = app.view(&sale).await;
    assert_eq!((&view["round"], &view["sold"]), (&json!(2), &json!(0)));
    sells_without_postgresql(&app, &sale).await;
    // The same buyer, another key: the limit counts in each round by itself.
    let fresh = async |key: &str| app.buy(&sale, bought[0].buyer, key, 1).await;
    let second = fresh("round-two").await.expect(201).json();
    assert_eq!(second["round"], 2);
    fresh("round-two-again").await.expect(201);
    // Sold out, and asked for so often that memory would answer, if it could know.
    for _ in 0..20 {
        let late = app.buy(&sale, clock::new_id(), "late", 1).await.expect(409);
        assert_eq!(late.json()["code"], "sold_out");
        bought[1].replays(&app, &sale).await;
    }
    assert_eq!(app.view(&sale).await["sold"], 3);
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wish_of_an_archived_round_is_answered_with_its_order_in_the_next_round() {
    let mut app = App::start_with(&AT_ONCE).await;
    let sale = app
        .sale(json!({ "allocation": 1, "hold_seconds": 3_600, "waitlist": true }))
        .await;
    let sale = id(&sale).to_owned();
    let (owner, eve) = (clock::new_id(), clock::new_id());
    let join = async |app: &App, quantity: u32| {
        let path = format!("/v1/sales/{sale}/waitlist");
        let request = ask(app, Method::POST, eve, &path);
        let request = request.header("Idempotency-Key", "wish");
        send(request.json(&json!({ "quantity": quantity }))).await
    };
    let bought = app.buy(&sale, owner, "k", 1).await.expect(201).json();
    join(&app, 1).await.expect(200);
    cancel(&app, &bought).await.expect(200);
    let order = join(&app, 1).await.expect(201);
    cancel(&app, &order.json()).await.expect(200);
    close(&app, &sale).await;
    let mut sql = sql(&app).await;
    archived(&mut sql, &sale).await;
    app.stop().await;
    second_round(&mut sql, 1).await;
    app.run().await;
    app.until(&format!("/v1/sales/{sale}"), |answer| answer.status == 200)
        .await;
    let bought = app.buy(&sale, owner, "again", 1).await.expect(201).json();
    // The same wish again has become that order; another one under its key is a mistake.
    assert_eq!(join(&app, 1).await.expect(201).text, order.text);
    let other = join(&app, 2).await.expect(422).json();
    assert_eq!(other["code"], "idempotency_key_mismatch");
    // What comes back is for the public, and the writer goes on.
    cancel(&app, &bought).await.expect(200);
    let view = app.view(&sale).await;
    assert_eq!(
        (&view["remaining"], &view["waiting"]),
        (&json!(1), &json!(0))
    );
    app.finish().await;
}

/// One is sold while nobody can read the orders of PostgreSQL.
async fn sells_without_postgresql(app: &App, sale: &str) {
    let buyer = clock::new_id();
    let sold = async {
        loop {
            // Which orders have left is read once, at a purchase that waits for nobody.
            let mut sql = lock_orders(app, "ACCESS EXCLUSIVE").await;
            let answer = app.buy(sale, buyer, "no-postgresql", 1).await;
            sqlx::raw_sql("ROLLBACK").execute(&mut sql).await.unwrap();
            if answer.status != 503 {
                answer.expect(201);
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, sold).await.unwrap();
}

/// Gives the only sale its second round, which sells at once. No node may run.
pub(crate) async fn second_round(sql: &mut PgConnection, allocation: u32) {
    let statement = format!(
        "INSERT INTO rounds (sale, round, unit_price, currency, initial_allocation, per_buyer_limit,
                             per_order_limit, opens_at, allocation, remaining, hold_ms, waitlist)
         SELECT sale, 2, unit_price, currency, {allocation}, per_buyer_limit, per_order_limit,
                opens_at, {allocation}, {allocation}, hold_ms, waitlist
         FROM rounds;
         UPDATE sales SET round = 2"
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(statement))
        .execute(sql)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_emptied_redis_brings_no_archived_round_back_and_no_settled_one_to_life() {
    let mut app = App::start_with(&AT_ONCE).await;
    let sale = app
        .sale(json!({ "allocation": 9, "per_buyer_limit": 3 }))
        .await;
    let sale = id(&sale).to_owned();
    let gone = Bought::some(&app, &sale, 4).await;
    close(&app, &sale).await;
    let mut sql = sql(&app).await;
    archived(&mut sql, &sale).await;
    let gone_certificate = certificate(&app, &sale).await;
    app.stop().await;
    second_round(&mut sql, 5).await;
    app.set("STOCKADE_ARCHIVE_AFTER", NEVER);
    app.run().await;
    app.until(&format!("/v1/sales/{sale}"), |answer| answer.status == 200)
        .await;
    let second = app.buy(&sale, gone[0].buyer, "second", 2).await.expect(201);
    let other = app.sale(json!({ "allocation": 6 })).await;
    let other = id(&other).to_owned();
    let settled = Bought::some(&app, &other, 4).await;
    cancel(&app, &settled[1].order()).await.expect(200);
    close(&app, &other).await;
    let other_certificate = certificate(&app, &other).await;
    for sale in [&sale, &other] {
        assert_eq!(app.audit(sale).await["verdict"], "pass");
    }
    let before = readings(&app, &other, &settled).await;

    let url = app.redis.server.url().expose_secret().to_owned();
    assert_eq!(redis(&url, "FLUSHALL"), "+OK");
    // PostgreSQL answers what is in no round that sells; everything else waits until Redis is made
    // anew.
    app.until(&format!("/v1/sales/{sale}"), |answer| answer.status == 200)
        .await;
    let doors = [app.door()];
    let again = app.purchase(
        &sale,
        gone[0].buyer,
        "second",
        r#"{"quantity":2}"#.to_owned(),
    );
    let again = insist(again, &doors).await.expect(201);
    assert_eq!(again.text, second.text);
    let in_redis = |key: &str, field: &str| redis(&url, &format!("HGET {key} {field}"));
    assert_eq!(redis(&url, "HLEN {p0}:sale:1:orders"), ":1");
    assert_eq!(
        redis(&url, "EXISTS {p0}:round:1.1:buyers {p0}:round:1.1:board"),
        ":0"
    );
    for (field, value) in [
        ("n_orders", "5"),
        ("n_archived", "4"),
        ("archived_rounds", "1"),
    ] {
        assert_eq!(in_redis("{p0}:sale:1", field), value, "{field}");
    }
    for bought in &gone {
        bought.replays(&app, &sale).await;
    }
    let fourth = app.buy(&sale, gone[0].buyer, "fourth", 2).await.expect(409);
    assert_eq!(fourth.json()["code"], "buyer_limit");
    assert_eq!(app.view(&sale).await["remaining"], 3);
    for bought in &settled {
        bought.replays(&app, &other).await;
    }
    refuses(&app, &other, &settled[0].order(), &settled[1].order()).await;
    assert_eq!(readings(&app, &other, &settled).await, before);
    for sale in [&sale, &other] {
        assert_eq!(app.audit(sale).await["verdict"], "pass");
    }
    assert_eq!(certificate(&app, &sale).await, gone_certificate);
    assert_eq!(certificate(&app, &other).await, other_certificate);

    // The settled one goes on to its archive from where it was.
    app.stop().await;
    app.set("STOCKADE_ARCHIVE_AFTER", "0");
    app.run().await;
    archived(&mut sql, &other).await;
    for bought in &settled {
        bought.replays(&app, &other).await;
    }
    assert_eq!(readings(&app, &other, &settled).await, before);
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_nodes_settle_certify_and_archive_once() {
    let app = App::start_with(&AT_ONCE).await;
    let other = app.node().await;
    let mut sql = sql(&app).await;
    let mut sales = Vec::new();
    for _ in 0..3 {
        let sale = app.sale(json!({ "allocation": 4 })).await;
        let sale = id(&sale).to_owned();
        let bought = Bought::some(&app, &sale, 4).await;
        close(&app, &sale).await;
        sales.push((sale, bought));
    }
    for (sale, bought) in &sales {
        archived(&mut sql, sale).await;
        let doors = [other.door()];
        for bought in bought {
            bought.replays(&app, sale).await;
            let body = json!({ "quantity": 1 }).to_string();
            let request = app.purchase(sale, bought.buyer, &bought.key, body);
            let there = insist(request, &doors).await.expect(201);
            assert_eq!(there.text, bought.answer.text);
        }
    }
    let counts: (i64, i64, i64) = sqlx::query_as(
        "SELECT (SELECT count(*) FROM certificates),
                (SELECT count(*) FROM round_events WHERE kind = 'settle'),
                (SELECT count(*) FROM round_events WHERE kind = 'archive')",
    )
    .fetch_one(&mut sql)
    .await
    .unwrap();
    assert_eq!(counts, (3, 3, 3));
    other.stop().await;
    app.finish().await;
}

/// Orders of a round that leaves; `STOCKADE_TEST_ORDERS` asks for more.
fn many() -> usize {
    let orders = std::env::var("STOCKADE_TEST_ORDERS").ok();
    orders.map_or(2_000, |orders| orders.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_round_leaves_in_steps_while_another_sale_sells() {
    let app = App::start_with(&AT_ONCE).await;
    let orders = many();
    let leaving = app.sale(json!({ "allocation": orders })).await;
    let leaving = id(&leaving).to_owned();
    let selling = app
        .sale(json!({ "allocation": 1_000_000, "per_buyer_limit": 100_000 }))
        .await;
    let selling = id(&selling).to_owned();
    let body = || json!({ "quantity": 1 }).to_string();
    for _ in 0..orders.div_ceil(500) {
        let requests = (0..500).map(|_| app.purchase(&leaving, clock::new_id(), "key", body()));
        crowd(requests).await;
    }
    close(&app, &leaving).await;
    let mut sql = sql(&app).await;
    let done = tokio_util::sync::CancellationToken::new();
    let buying = async {
        let mut sold = 0;
        while !done.is_cancelled() {
            let buyer = clock::new_id();
            app.buy(&selling, buyer, "key", 1).await.expect(201);
            sold += 1;
        }
        sold
    };
    // No look at either sale finds anything wrong, whenever it comes.
    let watching = async {
        while !done.is_cancelled() {
            for sale in [&leaving, &selling] {
                let path = format!("/v1/sales/{sale}/audit");
                let report = send(app.operate(Method::GET, &path)).await.expect(200);
                assert_ne!(report.json()["verdict"], "fail", "{}", report.text);
            }
        }
    };
    let leaving_redis = async {
        archived(&mut sql, &leaving).await;
        done.cancel();
    };
    let (sold, (), ()) = tokio::join!(buying, watching, leaving_redis);
    assert!(sold > 0);
    assert_eq!(app.view(&selling).await["sold"], sold);
    let certified = certificate(&app, &leaving).await;
    assert_eq!(certified["certificate"]["sold"], orders);
    let failed = sqlx::query_scalar("SELECT count(*) FROM audit_runs WHERE verdict = 'fail'");
    let failed: i64 = failed.fetch_one(&mut sql).await.unwrap();
    assert_eq!(failed, 0);
    let longest = sqlx::query_scalar("SELECT max(took_ms) FROM audit_runs");
    let longest: i64 = longest.fetch_one(&mut sql).await.unwrap();
    println!("{orders} orders: a full look took {longest} ms at most");
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trimmed_journal_changes_nothing() {
    let mut app = App::start_with(&[("STOCKADE_JOURNAL_RETENTION", "0")]).await;
    let sale = app.sale(json!({ "allocation": 60 })).await;
    let sale = id(&sale).to_owned();
    let bought = Bought::some(&app, &sale, 30).await;
    let url = app.redis.server.url().expose_secret().to_owned();
    let trimmed = async {
        // What is stored and old goes, and the last stored entry stays.
        while redis(&url, "XLEN {p0}:journal") != ":1" {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, trimmed).await.unwrap();
    for restart in [false, true] {
        if restart {
            app.stop().await;
            app.redis.server.kill().await;
            app.redis.server.restart().await.unwrap();
            app.run().await;
        }
        for bought in &bought {
            bought.replays(&app, &sale).await;
        }
        cancel(&app, &bought[usize::from(restart)].order())
            .await
            .expect(200);
        assert_eq!(app.audit(&sale).await["verdict"], "pass");
        Bought::some(&app, &sale, 5).await;
    }
    app.finish().await;
}
