//! A PostgreSQL that fails over to a standby which was behind: what it had stored and lost is
//! stored again from the journal, since the position went back with the rows.

use std::{fs, os::unix::fs::MetadataExt, path::Path, process::Command};

use secrecy::{ExposeSecret, SecretString};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use stockade::{
    embedded::{PostgresOptions, PostgresServer},
    store::{Database, DatabaseSettings},
};
use tempfile::TempDir;
use tokio::time::timeout;

use super::{
    faults::{Crowd, assert_sold, drop_of},
    selling::{assert_replays, stored, strangers},
    support::{
        Redis,
        app::{Answer, App, PATIENCE, crowd, send, sql},
        link::Link,
        open_dir,
    },
};

/// A primary and a standby that follows it asynchronously, and an application that reaches
/// whichever is primary.
struct Pair {
    app: App,
    primary: PostgresServer,
    standby: PostgresServer,
    /// Between the application and the primary.
    door: Link,
    /// Between the primary and the standby.
    cable: Link,
    _dir: TempDir,
}

impl Pair {
    async fn start() -> Self {
        let dir = open_dir();
        let password = SecretString::from("the_password_of_both");
        let options = |name: &str| PostgresOptions {
            password: password.clone(),
            throwaway: true,
            settings: vec![("synchronous_commit".to_owned(), "on".to_owned())],
            ..PostgresOptions::new(dir.path().join(name))
        };
        let primary = PostgresServer::start(options("primary")).await.unwrap();
        let url = primary.url().expose_secret();
        let database = Database::new(url, DatabaseSettings::default()).unwrap();
        database.migrate().await.unwrap();
        database.close().await;
        let hba = dir.path().join("primary/pg_hba.conf");
        let line = "host replication all 127.0.0.1/32 scram-sha-256\n";
        fs::write(&hba, fs::read_to_string(&hba).unwrap() + line).unwrap();
        ask(url, "SELECT pg_reload_conf()::text").await;

        let cable = Link::to(primary.port()).await;
        let replica = dir.path().join("standby");
        copy(
            &primary,
            cable.address(primary.url()).expose_secret(),
            &replica,
        )
        .await;
        let standby = PostgresServer::start(options("standby")).await.unwrap();

        let door = Link::to(primary.port()).await;
        let mut app = App::on(Redis::start().await, &[]).await;
        app.database_url = door.address(primary.url());
        app.run().await;
        Self {
            app,
            primary,
            standby,
            door,
            cable,
            _dir: dir,
        }
    }

    /// Waits until the standby has all that the primary has.
    async fn in_step(&self) {
        let lsn = ask(
            self.primary.url().expose_secret(),
            "SELECT pg_current_wal_lsn()::text",
        )
        .await;
        let has = format!("SELECT (pg_last_wal_replay_lsn() >= '{lsn}')::text");
        let waiting = async {
            while ask(self.standby.url().expose_secret(), &has).await != "true" {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        };
        timeout(PATIENCE, waiting).await.unwrap();
    }

    /// The primary is lost, and the standby takes its place with what it has.
    async fn fail_over(&self) {
        self.primary.kill().await;
        self.cable.cut();
        let promoted = ask(
            self.standby.url().expose_secret(),
            "SELECT pg_promote()::text",
        )
        .await;
        assert_eq!(promoted, "true");
        self.door.lead_to(self.standby.port());
        self.door.cut();
    }
}

/// What a server answers to a question.
async fn ask(url: &str, question: &str) -> String {
    let mut sql = PgConnection::connect(url).await.unwrap();
    sqlx::query_scalar(AssertSqlSafe(question.to_owned()))
        .fetch_one(&mut sql)
        .await
        .unwrap()
}

async fn orders_at(server: &PostgresServer) -> usize {
    let count = ask(
        server.url().expose_secret(),
        "SELECT count(*)::text FROM orders",
    )
    .await;
    count.parse().unwrap()
}

/// Copies a running cluster, so that a server on the copy follows it through `url`.
async fn copy(primary: &PostgresServer, url: &str, to: &Path) {
    let program = fs::read_link(format!("/proc/{}/exe", primary.pid())).unwrap();
    let mut copying = tokio::process::Command::new(program.with_file_name("pg_basebackup"));
    copying
        .arg("--pgdata")
        .arg(to)
        .args(["--dbname", url])
        .args(["--write-recovery-conf", "--checkpoint=fast", "--no-sync"])
        .kill_on_drop(true);
    let copied = timeout(PATIENCE, copying.output()).await.unwrap().unwrap();
    assert!(
        copied.status.success(),
        "{}",
        String::from_utf8_lossy(&copied.stderr)
    );
    // PostgreSQL runs as another user when we are root.
    let owner = fs::metadata(format!("/proc/{}", primary.pid())).unwrap();
    let chown = Command::new("chown")
        .arg("--recursive")
        .arg(format!("{}:{}", owner.uid(), owner.gid()))
        .arg(to)
        .status();
    assert!(chown.unwrap().success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_standby_lacks_is_stored_again() {
    let pair = Pair::start().await;
    let app = &pair.app;
    let sale = drop_of(app, 150).await;
    let mut answers = crowd(strangers(app, &sale, 30)).await;
    stored(app, &sale).await;
    pair.in_step().await;
    pair.cable.stall();
    let buying = Crowd::send(strangers(app, &sale, 270), vec![app.door()]);
    let known = orders_at(&pair.standby).await;
    let storing = async {
        while orders_at(&pair.primary).await < known + 30 {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, storing).await.unwrap();
    let lost = orders_at(&pair.primary).await - orders_at(&pair.standby).await;
    assert!(lost > 0, "the standby was not behind");
    pair.fail_over().await;
    answers.extend(buying.done().await);
    assert_sold(app, &sale, &answers, 150).await;
    pair.app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_that_lacks_an_epoch_takes_over() {
    let mut pair = Pair::start().await;
    let sale = drop_of(&pair.app, 60).await;
    let mut answers = crowd(strangers(&pair.app, &sale, 20)).await;
    stored(&pair.app, &sale).await;
    pair.in_step().await;
    pair.cable.stall();
    // Redis begins another epoch, which only the primary knows.
    pair.app.redis.server.restart().await.unwrap();
    let requests = strangers(&pair.app, &sale, 20);
    answers.extend(Crowd::send(requests, vec![pair.app.door()]).done().await);
    stored(&pair.app, &sale).await;
    pair.fail_over().await;
    let requests = strangers(&pair.app, &sale, 40);
    answers.extend(Crowd::send(requests, vec![pair.app.door()]).done().await);
    assert_sold(&pair.app, &sale, &answers, 60).await;
    pair.app.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_that_lacks_a_whole_sale_stores_nothing_until_it_has_it() {
    let pair = Pair::start().await;
    let app = &pair.app;
    let known = drop_of(app, 20).await;
    pair.in_step().await;
    pair.cable.stall();
    let sale = drop_of(app, 20).await;
    let requests = strangers(app, &sale, 20);
    let again: Vec<_> = requests
        .iter()
        .map(|request| request.try_clone().unwrap())
        .collect();
    let lost = crowd(requests).await;
    stored(app, &sale).await;
    let mut rows = Vec::new();
    for (table, by) in [
        ("products", "created_at"),
        ("sales", "number"),
        ("rounds", "sale"),
    ] {
        let newest =
            format!("SELECT row_to_json(t)::text FROM {table} t ORDER BY {by} DESC LIMIT 1");
        rows.push((
            table,
            ask(pair.primary.url().expose_secret(), &newest).await,
        ));
    }
    pair.fail_over().await;

    // The journal does not say what a sale is, so its orders wait there, and all that comes later.
    let halted = |answer: &Answer| {
        answer
            .text
            .contains("stockade_writer_halted{partition=\"0\"} 1")
    };
    app.until("/metrics", halted).await;
    let answers = crowd(strangers(app, &known, 30)).await;
    for request in again {
        let replay = send(request).await.expect(201);
        let first = lost.iter().find(|first| first.text == replay.text);
        assert_replays(&replay, first.unwrap());
    }
    // Somebody brings it back, as it was made.
    let mut sql = sql(app).await;
    for (table, row) in rows {
        let insert = format!(
            "INSERT INTO {table} OVERRIDING SYSTEM VALUE
             SELECT * FROM json_populate_record(null::{table}, $1::json)"
        );
        sqlx::query(AssertSqlSafe(insert))
            .bind(row)
            .execute(&mut sql)
            .await
            .unwrap();
    }
    sqlx::query(
        "UPDATE rounds SET remaining = allocation, sold = 0, seq = 0, epoch = 0, pseq = 0
         WHERE sale = (SELECT max(number) FROM sales)",
    )
    .execute(&mut sql)
    .await
    .unwrap();
    assert_sold(app, &known, &answers, 20).await;
    assert_sold(app, &sale, &lost, 20).await;
    pair.app.finish().await;
}
