//! Least privilege: each process with a role of its own in PostgreSQL and a user of its own in Redis,
//! for the whole life of a sale.

use std::{collections::BTreeSet, fmt::Write, fs, path::Path};

use reqwest::{Method, Response};
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use stockade::{
    app::{self, Role as Does},
    config::{Config, Endpoints},
    embedded::{RedisOptions, RedisRole},
    lifecycle::Lifecycle,
};
use tempfile::TempDir;
use tokio::{task::JoinHandle, time::timeout};
use uuid::Uuid;

use super::{
    holds::{join, line},
    replica::until_info,
    rounds_end::{Bought, archived, close},
    support::{
        Postgres, Redis,
        app::{App, PATIENCE, id, insist, send, sql},
        process::stockade,
        wire::Wire,
    },
};

/// The same store as somebody else.
fn login(url: &SecretString, role: &str) -> SecretString {
    let mut url = reqwest::Url::parse(url.expose_secret()).unwrap();
    url.set_username(role).unwrap();
    url.set_password(Some("secret")).unwrap();
    url.to_string().into()
}

/// A part of the application, as a process of its own would run it.
struct Process {
    life: Lifecycle,
    running: JoinHandle<()>,
}

impl Process {
    async fn stop(self) {
        self.life.stop();
        self.running.await.unwrap();
    }
}

/// Starts a part; whoever asks the application asks it, if it answers requests.
async fn start(app: &mut App, endpoints: &Endpoints, does: Does) -> Process {
    let config = Config::load(app.environment()).unwrap();
    let life = Lifecycle::new();
    let started = app::start(&config, endpoints, &[does], &life)
        .await
        .unwrap();
    if let Some(addr) = started.http_addr {
        app.speak_to(format!("http://{addr}"));
    }
    let ends = life.clone();
    Process {
        life,
        running: tokio::spawn(async move { ends.run().await.unwrap() }),
    }
}

#[tokio::test]
async fn each_process_has_the_tables_that_it_needs_and_nothing_more() {
    // Roles are the whole cluster's: one of its own.
    let postgres = Postgres::start(&[]).await;
    let mut app = App::without_node(&[]).await;
    app.database_url = postgres.server.url().clone();
    let mut owner = PgConnection::connect(app.database_url.expose_secret())
        .await
        .unwrap();
    sqlx::raw_sql(include_str!("../../deploy/postgresql-roles.sql"))
        .execute(&mut owner)
        .await
        .unwrap();
    sqlx::raw_sql(
        "CREATE ROLE http LOGIN PASSWORD 'secret' IN ROLE stockade_http;
         CREATE ROLE writer LOGIN PASSWORD 'secret' IN ROLE stockade_writer",
    )
    .execute(&mut owner)
    .await
    .unwrap();

    let mut running = Vec::new();
    for (role, does) in [("writer", Does::Writer), ("http", Does::Http)] {
        let endpoints = Endpoints {
            database_url: login(&app.database_url, role),
            ..app.endpoints()
        };
        running.push(start(&mut app, &endpoints, does).await);
    }
    app.ready().await;

    let account =
        json!({ "email": "ada@example.org", "password": "a password of the tests", "name": "Ada" });
    let register = app
        .request(Method::POST, "/v1/auth/register")
        .json(&account);
    send(register).await.expect(201);
    let account = json!({ "email": "ada@example.org", "password": "a password of the tests" });
    let inside = send(app.request(Method::POST, "/v1/auth/login").json(&account))
        .await
        .expect(200)
        .json();
    let refresh = json!({ "refresh_token": inside["refresh_token"] });
    send(app.request(Method::POST, "/v1/auth/refresh").json(&refresh))
        .await
        .expect(200);
    let sale = app.sale(json!({ "hold_seconds": 60 })).await;
    let (sale, buyer) = (id(&sale), Uuid::from_u128(7));
    let bought = app.buy(sale, buyer, "bought", 1).await.expect(201).json();
    let given_back = app
        .buy(sale, buyer, "given-back", 1)
        .await
        .expect(201)
        .json();
    send(
        app.operate(Method::POST, &format!("/v1/orders/{}/pay", id(&bought)))
            .header("Idempotency-Key", "k")
            .json(&json!({})),
    )
    .await;
    send(app.operate(
        Method::POST,
        &format!("/v1/orders/{}/cancel", id(&given_back)),
    ))
    .await
    .expect(200);
    for word in ["pause", "resume", "restock", "close"] {
        let request = app.operate(Method::POST, &format!("/v1/sales/{sale}/{word}"));
        let body = if word == "restock" {
            json!({ "units": 1 })
        } else {
            json!({})
        };
        send(request.header("Idempotency-Key", word).json(&body))
            .await
            .expect(200);
    }
    assert_eq!(app.audit(sale).await["verdict"], "pass");

    // What an intruder in one of them would like to do.
    for (role, forbidden) in [
        (
            "http",
            &[
                "UPDATE orders SET quantity = 1",
                "DELETE FROM orders",
                "INSERT INTO orders SELECT * FROM orders",
                "DELETE FROM round_events",
                "INSERT INTO round_events SELECT * FROM round_events",
                "UPDATE dead_letters SET resolved_at = now()",
                "UPDATE certificates SET jws = ''",
                "UPDATE audit_log SET actor = NULL",
                "UPDATE audit_log_head SET number = 0",
                "INSERT INTO audit_log (action, outcome, number) VALUES ('x', 'done', 1)",
                "ALTER TABLE audit_log DISABLE TRIGGER USER",
                "TRUNCATE products",
                "DROP TABLE carts",
                "CREATE TABLE mine (x int)",
                "DELETE FROM refunds",
                "DELETE FROM erased_users",
                "CREATE OR REPLACE FUNCTION audit_change() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
                "COPY (SELECT 1) TO PROGRAM 'true'",
            ][..],
        ),
        (
            "writer",
            &[
                "SELECT password_hash FROM users",
                "SELECT hash FROM refresh_tokens",
                "SELECT hash FROM api_keys",
                "UPDATE users SET role = 'admin'",
                "DELETE FROM orders",
                "UPDATE round_events SET units = 0",
                "UPDATE sales SET price_amount = 0",
                "UPDATE payments SET refund_due = 0",
                "INSERT INTO refunds SELECT * FROM refunds",
                "UPDATE audit_log SET actor = NULL",
                "DELETE FROM audit_log",
                "ALTER TABLE audit_log DISABLE TRIGGER USER",
            ][..],
        ),
    ] {
        let url = login(&app.database_url, role);
        let mut sql = PgConnection::connect(url.expose_secret()).await.unwrap();
        for statement in forbidden {
            let refused = sqlx::raw_sql(AssertSqlSafe(*statement))
                .execute(&mut sql)
                .await;
            let refused = refused
                .err()
                .unwrap_or_else(|| panic!("{role} may: {statement}"));
            let code = refused
                .as_database_error()
                .and_then(|error| error.code().map(String::from));
            assert_eq!(
                code.as_deref(),
                Some("42501"),
                "{role}: {statement}: {refused}"
            );
        }
    }
    for process in running.into_iter().rev() {
        process.stop().await;
    }
    app.abandon().await;
}

const USERS: &str = include_str!("../../deploy/redis-users.conf");

/// The commands and subcommands that a user of Redis may run.
fn commands(user: &str) -> BTreeSet<&'static str> {
    let line = USERS
        .lines()
        .find_map(|line| line.strip_prefix(&format!("user {user} ")));
    let words = line.unwrap_or_else(|| panic!("no {user}")).split(' ');
    words.filter_map(|word| word.strip_prefix('+')).collect()
}

/// The users, each with the password of the tests; the tests' own rights stay as they are.
fn users_in(dir: &Path) -> String {
    let hash = Sha256::digest("secret")
        .iter()
        .fold(String::new(), |mut hex, byte| {
            let _ = write!(hex, "{byte:02x}");
            hex
        });
    let (nobody, others): (Vec<_>, Vec<_>) = USERS
        .lines()
        .partition(|line| line.starts_with("user default off resetpass "));
    assert_eq!(nobody.len(), 1, "nobody may be in without a password");
    let open = others.join("\n");
    let file = dir.join("users.conf");
    fs::write(&file, open.replace(" off ", &format!(" on #{hash} "))).unwrap();
    file.to_str().unwrap().to_owned()
}

/// A Redis with these users.
async fn redis_with(users: &str, role: RedisRole) -> Redis {
    Redis::start_with(|options: &mut RedisOptions| {
        options.role = role;
        options.settings.extend(
            [
                ("include", users),
                ("masteruser", "stockade_replica"),
                ("masterauth", "secret"),
            ]
            .map(|(name, value)| (name.to_owned(), value.to_owned())),
        );
    })
    .await
}

/// Waits until a stream says this.
async fn heard(stream: &mut Response, what: &str) {
    let reading = async {
        let mut told = String::new();
        while !told.contains(what) {
            let piece = stream.chunk().await.unwrap().unwrap();
            told += std::str::from_utf8(&piece).unwrap();
        }
    };
    timeout(PATIENCE, reading).await.unwrap();
}

/// What this server has refused to anybody since it started.
async fn denials(redis: &Redis) -> Vec<String> {
    Wire::connect(redis).await.ask(&["ACL", "LOG"]).await
}

#[track_caller]
fn assert_no_denials(who: &str, denied: &[String]) {
    assert!(
        denied.is_empty(),
        "{who}: something new is used; deploy/redis-users.conf must grant it, and say so in \
         CHANGELOG.md: {denied:#?}"
    );
}

/// A command with the word that its refusal begins with.
async fn refused(wire: &mut Wire, user: &str, command: &[&str]) {
    wire.send(command).await;
    let answer = wire.line().await;
    let denied = answer.starts_with("-NOPERM")
        || answer.starts_with("-ERR The user executing the script can't");
    assert!(denied, "{user} may: {command:?}: {answer}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_process_has_the_commands_that_it_needs_and_nothing_more() {
    let dir = TempDir::new().unwrap();
    let users = users_in(dir.path());
    let (primary, replica, cache) = tokio::join!(
        redis_with(&users, RedisRole::Journal),
        redis_with(&users, RedisRole::Journal),
        redis_with(&users, RedisRole::Cache { memory_mib: 16 }),
    );
    let port = primary.server.port().to_string();
    let mut wire = Wire::connect(&replica).await;
    wire.run(&["REPLICAOF", "127.0.0.1", &port]).await;
    until_info(&mut wire, "master_link_status:up").await;
    let mut owner = Wire::connect(&primary).await;
    for (name, value) in [
        ("min-replicas-to-write", "1"),
        ("min-replicas-max-lag", "5"),
    ] {
        owner.run(&["CONFIG", "SET", name, value]).await;
    }
    until_info(&mut owner, "min_slaves_good_slaves:1").await;

    let mut app = App::on(
        primary,
        &[
            ("STOCKADE_REPLICAS", "1"),
            ("STOCKADE_RATE_LIMIT", "on"),
            ("STOCKADE_SANDBOX", "on"),
            ("STOCKADE_SETTLE_AFTER", "0"),
            ("STOCKADE_ARCHIVE_AFTER", "0"),
            ("STOCKADE_JOURNAL_RETENTION", "0"),
        ],
    )
    .await;
    let full = app.redis.server.url().clone();
    app.cache = Some(login(cache.server.url(), "stockade_cache"));
    let mut running = Vec::new();
    for (user, does) in [
        ("stockade_writer", Does::Writer),
        ("stockade_http", Does::Http),
    ] {
        app.redis.address = login(&full, user);
        let endpoints = app.endpoints();
        running.push(start(&mut app, &endpoints, does).await);
    }
    // Commands that operators type.
    app.redis.address = login(&full, "stockade");
    app.ready().await;

    // Units that come back, a line that gets them, a payment, and replicas that are waited for.
    let terms = json!({
        "allocation": 4, "hold_seconds": 600, "waitlist": true, "payment": "sandbox",
        "durability": "replicated",
    });
    let held = app.sale(terms).await;
    let held = id(&held).to_owned();
    let [first, second, waits, leaves] = [1, 2, 3, 4].map(Uuid::from_u128);
    let paid = app.buy(&held, first, "k", 2).await.expect(201).json();
    let given_back = app.buy(&held, second, "k", 2).await.expect(201).json();
    for _ in 0..3 {
        app.buy(&held, waits, "late", 1).await.expect(409);
    }
    for buyer in [waits, leaves] {
        send(join(&app, buyer, &held, 1, "w")).await.expect(200);
        send(line(&app, Method::GET, buyer, &held))
            .await
            .expect(200);
    }
    send(line(&app, Method::DELETE, leaves, &held))
        .await
        .expect(204);
    // It is told what happens to its orders.
    let buyer = app.token(waits, stockade::auth::Role::Buyer);
    let ticket = app.request(Method::POST, "/v1/me/events/tickets");
    let ticket = send(ticket.bearer_auth(&buyer)).await.expect(201).json();
    let path = format!(
        "/v1/me/events?ticket={}",
        ticket["ticket"].as_str().unwrap()
    );
    let mut stream = app.request(Method::GET, &path).send().await.unwrap();
    assert_eq!(stream.status(), 200);
    // From the snapshot on, what happens is told one by one.
    heard(&mut stream, "event: snapshot").await;
    let act = async |path: &str, key: &str, body: Value| {
        let request = app.operate(Method::POST, path);
        send(request.header("Idempotency-Key", key).json(&body)).await
    };
    let pay = app
        .request(Method::POST, &format!("/v1/orders/{}/pay", id(&paid)))
        .bearer_auth(app.token(first, stockade::auth::Role::Buyer))
        .header("Idempotency-Key", "pay");
    send(pay.json(&json!({ "payment_method": "sandbox_ok" })))
        .await
        .expect(200);
    let confirmed = format!("/v1/orders/{}", id(&paid));
    app.until(&confirmed, |answer| answer.json()["status"] == "confirmed")
        .await;
    act(
        &format!("/v1/orders/{}/cancel", id(&given_back)),
        "k",
        json!({}),
    )
    .await
    .expect(200);
    app.until(&format!("/v1/orders?buyer_id={waits}"), |answer| {
        answer.json()["data"] != json!([])
    })
    .await;
    heard(&mut stream, "event: order").await;
    drop(stream);
    for (word, body) in [
        ("pause", json!({})),
        ("resume", json!({})),
        ("restock", json!({ "units": 3 })),
        ("reduce", json!({ "units": 1 })),
    ] {
        act(&format!("/v1/sales/{held}/{word}"), word, body)
            .await
            .expect(200);
    }
    let places = app.pages(&format!("/v1/sales/{held}/leaderboard")).await;
    assert_eq!(places.len(), 1);
    assert_eq!(app.audit(&held).await["verdict"], "pass");

    // A round that ends, leaves Redis, and still answers.
    let ended = app.sale(json!({})).await;
    let ended = id(&ended).to_owned();
    let bought = Bought::some(&app, &ended, 3).await;
    close(&app, &ended).await;
    archived(&mut sql(&app).await, &ended).await;
    for bought in &bought {
        bought.replays(&app, &ended).await;
    }

    // A Redis that lost everything is made anew, by whichever process comes first.
    assert_eq!(owner.run(&["FLUSHALL"]).await, "OK");
    let again = app.purchase(&held, first, "again", r#"{"quantity":1}"#);
    let again = insist(again, &[app.door()]).await;
    assert_eq!(again.json()["code"], "buyer_limit");
    for words in [
        &["rebuild", "--dry-run"][..],
        &["audit"],
        &["dead-letters", "redrive"],
    ] {
        let output = stockade(&app, &[], words).await;
        assert!(output.status.success(), "{words:?}: {output:?}");
    }
    // The journal gets shorter in the end.
    let trimmed = async {
        let used = ["INFO", "commandstats"];
        while !owner.ask(&used).await.concat().contains("cmdstat_xtrim") {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, trimmed).await.unwrap();
    for (who, redis) in [
        ("primary", &app.redis),
        ("replica", &replica),
        ("cache", &cache),
    ] {
        assert_no_denials(who, &denials(redis).await);
    }

    // Nobody has what nobody uses.
    for (redis, user) in [(&app.redis, "stockade"), (&cache, "stockade_cache")] {
        let mut wire = Wire::connect(redis).await;
        let statistics = wire.ask(&["INFO", "commandstats"]).await.concat();
        let used: BTreeSet<_> = statistics
            .lines()
            .filter_map(|line| line.strip_prefix("cmdstat_")?.split(':').next())
            .collect();
        let unused: Vec<_> = commands(user)
            .into_iter()
            .filter(|command| !used.contains(command))
            .collect();
        assert!(
            unused.is_empty(),
            "{user} need not have {unused:?}: take it out of deploy/redis-users.conf"
        );
    }
    let all = commands("stockade");
    for part in ["stockade_http", "stockade_writer"] {
        assert!(commands(part).is_subset(&all), "{part}");
    }

    // What an intruder in one of them would like to do.
    let mut wire = Wire::connect(&app.redis).await;
    wire.run(&["SET", "foreign", "1"]).await;
    for user in [
        "stockade",
        "stockade_http",
        "stockade_writer",
        "stockade_cache",
    ] {
        let mut wire = Wire::to(login(&full, user).expose_secret()).await;
        for command in [
            &["FLUSHALL"][..],
            &["FLUSHDB"],
            &["CONFIG", "SET", "appendfsync", "no"],
            &["CONFIG", "REWRITE"],
            &["KEYS", "*"],
            &["SCAN", "0"],
            &["RANDOMKEY"],
            &["ACL", "WHOAMI"],
            &["ACL", "SETUSER", user, "+@all"],
            &["SHUTDOWN", "NOSAVE"],
            &["REPLICAOF", "NO", "ONE"],
            &["MONITOR"],
            &["SCRIPT", "FLUSH"],
            &["FUNCTION", "FLUSH"],
            &["CLIENT", "LIST"],
            &["MODULE", "LIST"],
            &["BGREWRITEAOF"],
            &["RENAME", "{p0}:meta", "{p1}:meta"],
            &["DEL", "{p0}:meta"],
            &["EXPIRE", "{p0}:meta", "1"],
            &["HGETALL", "{p0}:meta"],
            &["GET", "foreign"],
            &["HGET", "foreign", "x"],
            &["SET", "foreign", "2"],
            &["EVAL", "return 1", "1", "foreign"],
            &["EVAL", "return redis.call('HGET', 'foreign', 'x')", "0"],
            &["EVAL", "return redis.call('FLUSHALL')", "0"],
            &["EVAL", "return redis.call('KEYS', '*')", "0"],
            &["EVAL", "return redis.call('PUBLISH', 'foreign', '')", "0"],
            &["PUBLISH", "foreign", ""],
            &["SUBSCRIBE", "{p0}:replicas"],
        ] {
            refused(&mut wire, user, command).await;
        }
    }
    assert_eq!(wire.ask(&["GET", "foreign"]).await, ["1"]);

    for process in running.into_iter().rev() {
        process.stop().await;
    }
    app.abandon().await;
}

#[test]
fn every_command_that_is_written_down_is_granted() {
    let (journal, cache) = (commands("stockade"), commands("stockade_cache"));
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut calls = 0;
    for folder in ["lua", "lua/shared", "src/engine"] {
        for entry in fs::read_dir(root.join(folder)).unwrap() {
            let path = entry.unwrap().path();
            let is_cache = ["limit.lua", "cache.rs"]
                .iter()
                .any(|name| path.ends_with(name));
            let granted = if is_cache { &cache } else { &journal };
            let text = fs::read_to_string(&path).unwrap_or_default();
            for way in [
                "call('",
                "call_with('",
                "count('",
                "command(\"",
                "ask(\"",
                "values(\"",
            ] {
                for (at, _) in text.match_indices(way) {
                    let command: String = text[at + way.len()..]
                        .chars()
                        .take_while(char::is_ascii_uppercase)
                        .map(|letter| letter.to_ascii_lowercase())
                        .collect();
                    calls += 1;
                    let of_it = format!("{command}|");
                    assert!(
                        granted
                            .iter()
                            .any(|one| *one == command || one.starts_with(&of_it)),
                        "{} calls {command}: add +{command} to deploy/redis-users.conf, for every \
                         user that needs it",
                        path.display()
                    );
                }
            }
        }
    }
    assert!(calls > 100, "{calls}");
}

#[tokio::test]
async fn a_user_that_may_too_little_is_told_so_before_anything_is_half_done() {
    let mut app = App::start().await;
    let sale = app.sale(json!({})).await;
    let sale = id(&sale).to_owned();
    let buyer = Uuid::from_u128(7);
    app.buy(&sale, buyer, "k", 1).await.expect(201);
    assert_eq!(app.audit(&sale).await["verdict"], "pass");
    app.stop().await;

    let full = app.redis.server.url().clone();
    app.redis.address = login(&full, "weak");
    let mut owner = Wire::connect(&app.redis).await;
    let config = Config::load(app.environment()).unwrap();
    let grants = USERS
        .lines()
        .find_map(|line| line.strip_prefix("user stockade off "));
    let grants: Vec<_> = grants.unwrap().split(' ').collect();
    for (missing, says) in [
        // Nobody of this name.
        ("-@all", "WRONGPASS"),
        ("-info", "'info'"),
        ("-eval", "'eval'"),
        ("-hset", "may not run HSET"),
        ("-xadd", "may not run XADD"),
        ("resetkeys", "one of the keys"),
    ] {
        if missing != "-@all" {
            let mut words = vec!["ACL", "SETUSER", "weak", "reset", "on", ">secret"];
            words.extend(&grants);
            words.push(missing);
            owner.run(&words).await;
        }
        let said = stockade(&app, &[], &["rebuild", "--dry-run"]).await;
        let said = String::from_utf8(said.stderr).unwrap();
        assert!(said.contains(says), "{missing}: {said}");
        assert!(
            said.contains("deploy/redis-users.conf"),
            "{missing}: {said}"
        );

        // A node says it at start, or sells nothing.
        let life = Lifecycle::new();
        match app::start(&config, &app.endpoints(), Does::ALL, &life).await {
            Ok(started) => {
                app.speak_to(format!("http://{}", started.http_addr.unwrap()));
                let refused = app.buy(&sale, buyer, "k2", 1).await.expect(503).json();
                assert_eq!(refused["outcome"], "not_applied", "{missing}");
            }
            Err(error) => {
                let error = format!("{error:#}");
                assert!(error.contains("REDIS_URL"), "{missing}: {error}");
                assert!(error.contains("deploy/redis-users.conf"), "{error}");
            }
        }
        life.stop();
        life.run().await.unwrap();
    }

    app.redis.address = full;
    app.run().await;
    assert_eq!(app.view(&sale).await["sold"], 1);
    app.finish().await;
}
