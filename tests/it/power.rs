//! Power loss: what was not synced is gone. `kill -9` proves nothing about that, since what was
//! written survives in the kernel; here every file is set back to what its server had synced
//! (`shim.c`).

use std::{
    collections::{BTreeSet, HashSet},
    fs,
};

use chrono::{DateTime, Utc};
use rand::Rng;
use reqwest::Method;
use secrecy::ExposeSecret;
use serde_json::Value;
use sqlx::{Connection, PgConnection};
use stockade::{
    clock,
    embedded::{PostgresOptions, PostgresServer},
    store::{Database, DatabaseSettings},
};
use tempfile::TempDir;
use tokio::{sync::watch, task::JoinSet, time::timeout};
use uuid::Uuid;

use super::{
    faults::{assert_not_applied, drop_of, until_fenced},
    selling::{OrderRow, rows, stored, strangers, uuid},
    support::{
        Redis,
        app::{App, PATIENCE, crowd, send, try_send},
        open_dir,
        shim::{Shim, power_loss},
        wire::Wire,
    },
};

/// Units of each sale: more than anybody buys, so that the crowd never has to stop.
const UNITS: u64 = 1_000_000;
/// How many buy at a time.
const BUYERS: usize = 16;
/// What `everysec` may lose, in milliseconds of acceptances.
const WINDOW_MS: i64 = 1_100;

/// A crowd that buys until it is told to stop. Each purchase has a buyer of its own, who insists.
pub(crate) struct Load {
    stop: watch::Sender<bool>,
    accepted: watch::Receiver<usize>,
    buying: JoinSet<Bought>,
}

/// What a crowd got.
#[derive(Default)]
pub(crate) struct Bought {
    /// The bodies of all 201s.
    pub(crate) accepted: Vec<Value>,
    /// Buyers who had no answer yet when everybody stopped.
    pub(crate) unanswered: HashSet<Uuid>,
}

impl Load {
    pub(crate) fn on(app: &App, sale: &str) -> Self {
        let (count, accepted) = watch::channel(0);
        let stop = watch::Sender::new(false);
        let mut buying = JoinSet::new();
        for _ in 0..BUYERS {
            let (stop, count) = (stop.subscribe(), count.clone());
            // A token costs more than a purchase: they are made before.
            let mut waiting = strangers_of(app, sale, 400);
            buying.spawn(async move {
                let mut bought = Bought::default();
                while !*stop.borrow() {
                    let (buyer, request) = waiting.pop().unwrap();
                    loop {
                        let attempt = try_send(request.try_clone().unwrap()).await;
                        match attempt {
                            Ok(answer) if answer.status == 201 => {
                                bought.accepted.push(answer.json());
                                count.send_modify(|count| *count += 1);
                                break;
                            }
                            Ok(answer) => assert_eq!(answer.status, 503, "{answer:?}"),
                            Err(_) => {}
                        }
                        if *stop.borrow() {
                            bought.unanswered.insert(buyer);
                            break;
                        }
                        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                    }
                }
                bought
            });
        }
        Self {
            stop,
            accepted,
            buying,
        }
    }

    /// Returns once so many more were accepted.
    pub(crate) async fn more(&mut self, count: usize) {
        let enough = *self.accepted.borrow() + count;
        let accepted = self.accepted.wait_for(|accepted| *accepted >= enough);
        timeout(PATIENCE, accepted).await.unwrap().unwrap();
    }

    /// How many were accepted by now.
    pub(crate) fn told(&self) -> usize {
        *self.accepted.borrow()
    }

    /// Stops everybody.
    pub(crate) async fn stop(self) -> Bought {
        self.stop.send_replace(true);
        let mut all = Bought::default();
        for bought in self.buying.join_all().await {
            all.accepted.extend(bought.accepted);
            all.unanswered.extend(bought.unanswered);
        }
        all.accepted.sort_by_key(|body| body["seq"].as_u64());
        all
    }
}

/// Purchases of one unit by new buyers, with their buyers.
fn strangers_of(app: &App, sale: &str, count: usize) -> Vec<(Uuid, reqwest::RequestBuilder)> {
    (0..count)
        .map(|_| {
            let buyer = clock::new_id();
            (buyer, app.purchase(sale, buyer, "k", r#"{"quantity":1}"#))
        })
        .collect()
}

impl Bought {
    /// Every 201 is a row, with the same content, and every other row is of somebody who had no
    /// answer.
    pub(crate) async fn is_stored(&self, app: &App, sale: &str) {
        let rows = stored(app, sale).await;
        let accepted: BTreeSet<_> = self.accepted.iter().map(OrderRow::of).collect();
        let buyers: HashSet<_> = rows.iter().map(|row| row.buyer).collect();
        assert_eq!(buyers.len(), rows.len(), "somebody bought twice");
        let lost: Vec<_> = accepted
            .iter()
            .filter(|order| !rows.contains(order))
            .collect();
        assert!(lost.is_empty(), "lost: {lost:?}");
        for row in rows {
            assert!(
                accepted.contains(&row) || self.unanswered.contains(&row.buyer),
                "nobody bought {row:?}"
            );
        }
    }
}

/// What one power loss did.
struct Cycle {
    acknowledged: usize,
    lost: usize,
    /// From the first acceptance that was lost to the cut, in milliseconds.
    window_ms: i64,
}

/// How many power losses each mode gets: `make power-loss CYCLES=n`.
fn cycles() -> usize {
    let cycles = std::env::var("STOCKADE_TEST_CYCLES");
    cycles.map_or(2, |cycles| cycles.parse().unwrap())
}

#[expect(
    clippy::print_stdout,
    reason = "`make power-loss` is about these lines"
)]
fn print(mode: &str, cycles: &[Cycle]) {
    let line = |name: &str, figure: &dyn Fn(&Cycle) -> i64| {
        let mut figures: Vec<_> = cycles.iter().map(figure).collect();
        figures.sort_unstable();
        let (min, median, max) = (
            figures[0],
            figures[figures.len() / 2],
            figures[figures.len() - 1],
        );
        println!("{mode:<10} {name:<14} {min:>8} {median:>8} {max:>8}");
    };
    println!(
        "{:<10} {:<14} {:>8} {:>8} {:>8}",
        "",
        cycles.len(),
        "min",
        "median",
        "max"
    );
    line("acknowledged", &|cycle| {
        cycle.acknowledged.try_into().unwrap()
    });
    line("lost", &|cycle| cycle.lost.try_into().unwrap());
    line("window in ms", &|cycle| cycle.window_ms);
}

async fn redis_that_syncs(shim: &Shim, when: &str) -> Redis {
    Redis::start_with(|options| {
        options.environment = shim.environment();
        options
            .settings
            .push(("appendfsync".to_owned(), when.to_owned()));
    })
    .await
}

#[tokio::test]
async fn a_power_loss_takes_what_was_not_synced_and_a_crash_does_not() {
    let shim = Shim::new();
    let mut redis = redis_that_syncs(&shim, "no").await;
    let url = redis.server.url().expose_secret().to_owned();
    let mut wire = Wire::to(&url).await;
    assert_eq!(wire.run(&["SET", "order", "7"]).await, "OK");
    redis.server.kill().await;
    redis.server.restart().await.unwrap();
    let mut wire = Wire::to(&url).await;
    assert_eq!(wire.ask(&["GET", "order"]).await, ["7"], "a crash took it");
    assert!(redis.power_loss(&shim).await > 0);
    redis.server.restart().await.unwrap();
    let mut wire = Wire::to(&url).await;
    assert_eq!(wire.ask(&["GET", "order"]).await, [""; 0]);

    // Nothing is lost that was synced, also after the file was written anew.
    let mut wire = {
        assert_eq!(
            wire.run(&["CONFIG", "SET", "appendfsync", "always"]).await,
            "OK"
        );
        wire
    };
    assert_eq!(wire.run(&["SET", "order", "8"]).await, "OK");
    wire.run(&["BGREWRITEAOF"]).await;
    let rewritten = async {
        while !wire.ask(&["INFO", "persistence"]).await[0].contains("aof_rewrite_in_progress:0") {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, rewritten).await.unwrap();
    assert_eq!(wire.run(&["APPEND", "order", "9"]).await, "2");
    assert_eq!(redis.power_loss(&shim).await, 0);
    redis.server.restart().await.unwrap();
    let mut wire = Wire::to(&url).await;
    assert_eq!(wire.ask(&["GET", "order"]).await, ["89"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_synced_always_survives_every_power_loss() {
    let shim = Shim::new();
    let mut app = App::start_on(redis_that_syncs(&shim, "always").await, &[]).await;
    let mut done = Vec::new();
    for _ in 0..cycles() {
        let sale = drop_of(&app, UNITS).await;
        let mut load = Load::on(&app, &sale);
        load.more(rand::rng().random_range(50..300)).await;
        app.redis.power_loss(&shim).await;
        app.redis.server.restart().await.unwrap();
        // It goes on by itself: nothing that anybody has seen is missing.
        load.more(50).await;
        let bought = load.stop().await;
        bought.is_stored(&app, &sale).await;
        done.push(Cycle {
            acknowledged: bought.accepted.len(),
            lost: 0,
            window_ms: 0,
        });
    }
    print("always", &done);
    app.finish().await;
}

/// A PostgreSQL that syncs as in production, with the schema, and the directory that it is below.
pub(crate) async fn postgres_that_syncs(shim: &Shim, fsync: &str) -> (PostgresServer, TempDir) {
    let dir = open_dir();
    let settings = [
        ("fsync", fsync),
        ("synchronous_commit", "on"),
        ("full_page_writes", "on"),
        ("wal_sync_method", "fdatasync"),
        // A table that is vacuumed and a small log have more to lose in between.
        ("autovacuum_naptime", "1s"),
        ("max_wal_size", "32MB"),
    ];
    let options = PostgresOptions {
        throwaway: true,
        environment: shim.environment_with_undo(),
        settings: settings
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .to_vec(),
        ..PostgresOptions::new(dir.path().join("postgres"))
    };
    (PostgresServer::start(options).await.unwrap(), dir)
}

/// An application on a PostgreSQL of its own.
pub(crate) async fn app_on(redis: Redis, postgres: &PostgresServer) -> App {
    let url = postgres.url().expose_secret();
    let database = Database::new(url, DatabaseSettings::default()).unwrap();
    database.migrate().await.unwrap();
    database.close().await;
    let mut app = App::on(redis, &[]).await;
    app.database_url = postgres.url().clone();
    app.run().await;
    app
}

async fn run(server: &PostgresServer, statement: &'static str) {
    let url = server.url().expose_secret();
    let mut sql = PgConnection::connect(url).await.unwrap();
    sqlx::raw_sql(statement).execute(&mut sql).await.unwrap();
}

#[tokio::test]
async fn a_power_loss_takes_from_postgresql_what_it_did_not_sync() {
    for (fsync, left) in [("off", false), ("on", true)] {
        let shim = Shim::new();
        let (mut server, dir) = postgres_that_syncs(&shim, fsync).await;
        let is_there = async |server: &PostgresServer| {
            let mut sql = PgConnection::connect(server.url().expose_secret())
                .await
                .unwrap();
            let there = sqlx::query_scalar("SELECT to_regclass('kept') IS NOT NULL");
            let there: bool = there.fetch_one(&mut sql).await.unwrap();
            there
        };
        run(&server, "CREATE TABLE kept (row integer)").await;
        server.kill().await;
        server.restart().await.unwrap();
        assert!(is_there(&server).await, "a crash took it");
        let lost = power_loss(&server, dir.path(), &shim, &mut || false).await;
        assert!(lost > 0);
        // Without its content it would have to be removed by hand; `serve` does so.
        fs::remove_file(dir.path().join("postgres/postmaster.pid")).unwrap();
        // One that syncs nothing may be past starting.
        let is_left = server.restart().await.is_ok() && is_there(&server).await;
        assert_eq!(is_left, left, "fsync {fsync}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_power_loss_of_both_stores_loses_nothing_and_doubles_nothing() {
    let (under_redis, under_postgres) = (Shim::new(), Shim::new());
    let (mut postgres, dir) = postgres_that_syncs(&under_postgres, "on").await;
    let redis = redis_that_syncs(&under_redis, "always").await;
    let mut app = app_on(redis, &postgres).await;
    let mut done = Vec::new();
    for _ in 0..cycles() {
        let sale = drop_of(&app, UNITS).await;
        let mut load = Load::on(&app, &sale);
        load.more(rand::rng().random_range(20..200)).await;
        run(&postgres, "CHECKPOINT").await;
        load.more(rand::rng().random_range(20..200)).await;
        app.redis.power_loss(&under_redis).await;
        let early: f64 = [0.0, 0.5, 0.9][rand::rng().random_range(0..3)];
        let mut keep = || rand::rng().random_bool(early);
        let lost = power_loss(&postgres, dir.path(), &under_postgres, &mut keep).await;
        assert!(lost > 0 || early > 0.0, "PostgreSQL had nothing to lose");
        // What it had committed it still has, and a position that fits to it.
        postgres.restart().await.unwrap();
        app.redis.server.restart().await.unwrap();
        load.more(50).await;
        let bought = load.stop().await;
        bought.is_stored(&app, &sale).await;
        done.push(Cycle {
            acknowledged: bought.accepted.len(),
            lost: 0,
            window_ms: 0,
        });
    }
    print("both", &done);
    app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_synced_every_second_is_lost_within_the_window_and_never_unnoticed() {
    let mut done = Vec::new();
    for _ in 0..cycles() {
        done.push(lose_a_second().await);
    }
    print("everysec", &done);
}

async fn lose_a_second() -> Cycle {
    let shim = Shim::new();
    let mut app = App::start_on(redis_that_syncs(&shim, "everysec").await, &[]).await;
    let sale = drop_of(&app, UNITS).await;
    let mut load = Load::on(&app, &sale);
    load.more(1).await;
    // Two syncs later the crowd has bought for a second at least; then at any point of a second.
    let begun = shim.syncs();
    let syncs = async {
        while shim.syncs() < begun + 2 {
            load.more(1).await;
        }
    };
    timeout(PATIENCE, syncs).await.unwrap();
    load.more(rand::rng().random_range(1..500)).await;
    let cut_at = clock::now();
    app.redis.power_loss(&shim).await;
    // Whoever was accepted before the cut has the answer, or never gets it.
    let bought = load.stop().await;
    app.redis.server.restart().await.unwrap();

    let mut wire = Wire::connect(&app.redis).await;
    let kept = wire.ask(&["HGET", "{p0}:round:1.1", "seq"]).await;
    let kept: u64 = kept[0].parse().unwrap();
    let orders = wire.ask(&["HLEN", "{p0}:sale:1:orders"]).await;
    assert_eq!(
        orders,
        [kept.to_string()],
        "not the first ones that were accepted"
    );
    let is_lost = |body: &&Value| body["seq"].as_u64().unwrap() > kept;
    let lost: Vec<_> = bought.accepted.iter().filter(is_lost).collect();
    let window_ms = lost.first().map_or(0, |body| {
        let at: DateTime<Utc> = body["accepted_at"].as_str().unwrap().parse().unwrap();
        (cut_at - at).num_milliseconds()
    });
    // Only `make power-loss` has the machine for itself.
    assert!(
        window_ms <= WINDOW_MS || std::env::var("STOCKADE_TEST_CYCLES").is_err(),
        "{window_ms} ms of acceptances were lost"
    );
    let cycle = Cycle {
        acknowledged: bought.accepted.len(),
        lost: lost.len(),
        window_ms,
    };
    if cycle.lost > 0 && !is_made_anew(&app, &sale, &bought).await {
        until_fenced(&app).await;
        stays_fenced(app, &sale, &bought).await;
    } else {
        bought.is_stored(&app, &sale).await;
        app.finish().await;
    }
    cycle
}

/// Whether PostgreSQL had everything that Redis lost: then Redis is made anew. The writer stores
/// what it had read before, and is halted by the fence when it has.
async fn is_made_anew(app: &App, sale: &str, bought: &Bought) -> bool {
    let deciding = async {
        loop {
            let halted = app.get("/metrics").await.text;
            let halted = halted.contains("stockade_writer_halted{partition=\"0\"} 1");
            let stored: HashSet<_> = rows(app, sale).await.iter().map(|row| row.id).collect();
            let all = bought
                .accepted
                .iter()
                .all(|body| stored.contains(&uuid(&body["id"])));
            if all {
                app.ready().await;
                return true;
            }
            if halted {
                return false;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, deciding).await.unwrap()
}

/// After acknowledged orders were lost: nothing is sold, whoever asks, and PostgreSQL has no order
/// that nobody bought. (Rebuilding the partition begins here.)
pub(crate) async fn stays_fenced(app: App, sale: &str, bought: &Bought) {
    for answer in crowd(strangers(&app, sale, 20)).await {
        assert_not_applied(&answer);
    }
    let pause = app.operate(Method::POST, &format!("/v1/sales/{sale}/pause"));
    assert_not_applied(&send(pause).await);
    until_fenced(&app).await;
    let known: HashSet<_> = bought
        .accepted
        .iter()
        .map(|body| uuid(&body["id"]))
        .collect();
    for row in rows(&app, sale).await {
        assert!(
            known.contains(&row.id) || bought.unanswered.contains(&row.buyer),
            "nobody bought {row:?}"
        );
    }
    app.abandon().await;
}
