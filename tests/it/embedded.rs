//! The embedded services against the real programs: started, crashed, stopped, taken over.

use std::fs;
use std::io::{BufRead, BufReader, Lines, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use secrecy::{ExposeSecret, SecretString};
use sqlx::{Connection, PgConnection};
use stockade::embedded::{
    EmbeddedConfig, EmbeddedError, PostgresOptions, PostgresServer, RedisOptions, RedisRole,
    RedisServer, Services,
};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

/// A directory that PostgreSQL's user may pass through, as it must when we are root.
fn passable_dir() -> TempDir {
    tempfile::Builder::new()
        .permissions(fs::Permissions::from_mode(0o711))
        .tempdir()
        .unwrap()
}

/// Sends one inline command and gives its reply: a line, a bulk string, or the last string of a pair.
pub(crate) fn redis(url: &str, command: &str) -> String {
    let (password, host) = url
        .strip_prefix("redis://default:")
        .unwrap()
        .split_once('@')
        .unwrap();
    let mut stream = TcpStream::connect(host).unwrap();
    write!(stream, "AUTH {password}\r\n{command}\r\n").unwrap();
    let mut lines = BufReader::new(stream).lines();
    let mut line = || lines.next().unwrap().unwrap();
    assert_eq!(line(), "+OK");
    let first = line();
    match first.as_str() {
        "*2" => (0..4).map(|_| line()).last().unwrap(),
        length if length.starts_with('$') && length != "$-1" => line(),
        _ => first,
    }
}

async fn one_plus_one(url: &SecretString) -> i32 {
    let mut connection = PgConnection::connect(url.expose_secret()).await.unwrap();
    sqlx::query_scalar("SELECT 1 + 1")
        .fetch_one(&mut connection)
        .await
        .unwrap()
}

fn pid(raw: u32) -> Pid {
    Pid::from_raw(raw.try_into().unwrap()).unwrap()
}

/// Whether a process is there that is more than an unreaped entry.
fn lives(raw: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{raw}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

#[tokio::test]
async fn a_redis_keeps_port_and_journal_across_a_crash() {
    let dir = tempfile::tempdir().unwrap();
    let options = RedisOptions {
        throwaway: true,
        ..RedisOptions::new(dir.path().join("redis"), RedisRole::Journal)
    };
    let mut server = RedisServer::start(options).await.unwrap();
    let url = server.url().expose_secret().to_owned();
    assert_eq!(redis(&url, "SET order 7"), "+OK");
    for (parameter, value) in [
        ("appendonly", "yes"),
        ("appendfsync", "always"),
        ("no-appendfsync-on-rewrite", "no"),
        ("maxmemory-policy", "noeviction"),
        ("bind", "127.0.0.1"),
    ] {
        assert_eq!(
            redis(&url, &format!("CONFIG GET {parameter}")),
            value,
            "{parameter}"
        );
    }
    let first = server.pid();
    server.kill().await;
    assert!(!lives(first));
    server.restart().await.unwrap();
    assert_ne!(server.pid(), first);
    assert_eq!(server.url().expose_secret(), url);
    assert_eq!(redis(&url, "GET order"), "7");
    let last = server.pid();
    drop(server);
    assert!(!lives(last), "a throwaway is gone when dropped");
}

#[tokio::test]
async fn a_redis_that_cannot_start_says_why_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let options = RedisOptions {
        settings: vec![("maxmemory-policy".to_owned(), "whatever".to_owned())],
        throwaway: true,
        ..RedisOptions::new(dir.path(), RedisRole::Journal)
    };
    let error = RedisServer::start(options).await.unwrap_err();
    assert!(matches!(error, EmbeddedError::Exited { .. }));
    let line = error.to_string();
    assert!(
        line.contains("maxmemory-policy") && line.contains("redis.log") && !line.contains('\n'),
        "{line}"
    );
}

#[tokio::test]
async fn a_postgres_recovers_from_a_crash_and_lets_nobody_in_without_the_password() {
    let dir = passable_dir();
    let options = PostgresOptions {
        throwaway: true,
        ..PostgresOptions::new(dir.path().join("cluster"))
    };
    let mut server = PostgresServer::start(options).await.unwrap();
    assert_eq!(one_plus_one(server.url()).await, 2);
    let stranger = format!(
        "postgres://stockade:wrong@127.0.0.1:{}/stockade",
        server.port()
    );
    let refused = PgConnection::connect(&stranger).await.unwrap_err();
    let code = refused
        .as_database_error()
        .and_then(|error| error.code().map(|code| code.to_string()));
    assert_eq!(code.as_deref(), Some("28P01"), "{refused}");

    let url = server.url().expose_secret().to_owned();
    server.kill().await;
    server.restart().await.unwrap();
    assert_eq!(server.url().expose_secret(), url);
    assert_eq!(one_plus_one(server.url()).await, 2);
    server.stop().await;
}

#[tokio::test]
async fn services_are_supervised_locked_and_stopped() {
    let dir = passable_dir();
    let data_dir = dir.path().join("data");
    let config = EmbeddedConfig {
        data_dir: data_dir.clone(),
        database_pool: 10,
    };
    let services = Services::start(&config).await.unwrap();

    let second = Services::start(&config).await.unwrap_err();
    assert!(matches!(second, EmbeddedError::Locked { .. }), "{second}");
    assert!(
        second
            .to_string()
            .contains(&format!("pid {}", std::process::id())),
        "{second}"
    );

    let file = data_dir.join("endpoints.json");
    for closed in [
        "endpoints.json",
        "redis_password",
        "postgres_password",
        "redis/redis.conf",
    ] {
        assert_eq!(
            fs::metadata(data_dir.join(closed))
                .unwrap()
                .permissions()
                .mode()
                & 0o777,
            0o600,
            "{closed}"
        );
    }
    let written: serde_json::Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    let redis_url = services.endpoints().redis_url.expose_secret().to_owned();
    let cache_url = services
        .endpoints()
        .cache_redis_url
        .as_ref()
        .unwrap()
        .expose_secret()
        .to_owned();
    assert_eq!(written["redis_url"], redis_url);
    assert_eq!(written["cache_redis_url"], cache_url);
    assert_eq!(
        written["database_url"],
        services.endpoints().database_url.expose_secret()
    );
    assert_eq!(one_plus_one(&services.endpoints().database_url).await, 2);

    // One that dies is started again, on its port, with its data.
    assert_eq!(redis(&redis_url, "SET order 7"), "+OK");
    let mut journal = services.journal_pid();
    let first = journal.borrow_and_update().unwrap();
    kill_process(pid(first), Signal::KILL).unwrap();
    let now = journal
        .wait_for(|pid| pid.is_some_and(|pid| pid != first))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(redis(&redis_url, "GET order"), "7");

    // One that is stopped is let be, while the supervisors are at work.
    kill_process(pid(now), Signal::STOP).unwrap();
    let mut cache = services.cache_pid();
    for _ in 0..3 {
        let before = cache.borrow_and_update().unwrap();
        kill_process(pid(before), Signal::KILL).unwrap();
        cache
            .wait_for(|pid| pid.is_some_and(|pid| pid != before))
            .await
            .unwrap();
    }
    assert_eq!(*journal.borrow(), Some(now));
    kill_process(pid(now), Signal::CONT).unwrap();
    assert_eq!(redis(&redis_url, "GET order"), "7");
    assert_eq!(redis(&cache_url, "PING"), "+PONG");

    // PostgreSQL too.
    let mut postgres = services.postgres_pid();
    let before = postgres.borrow_and_update().unwrap();
    kill_process(pid(before), Signal::KILL).unwrap();
    let after = postgres
        .wait_for(|pid| pid.is_some_and(|pid| pid != before))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(one_plus_one(&services.endpoints().database_url).await, 2);

    let last = [now, cache.borrow().unwrap(), after];
    services.shutdown(CancellationToken::new()).await;
    assert!(last.into_iter().all(|pid| !lives(pid)));

    // The next session has the same ports and the same data.
    let services = Services::start(&config).await.unwrap();
    assert_eq!(services.endpoints().redis_url.expose_secret(), redis_url);
    assert_eq!(redis(&redis_url, "GET order"), "7");
    services.shutdown(CancellationToken::new()).await;
}

/// A `stockade serve` whose stores are ready.
struct Serve {
    child: Child,
    log: Lines<BufReader<ChildStderr>>,
}

impl Serve {
    fn command(data_dir: &Path) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_stockade"));
        command
            .arg("serve")
            .current_dir(data_dir.parent().unwrap())
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap())
            .env("STOCKADE_DATA_DIR", data_dir)
            .env("STOCKADE_HTTP_ADDR", "127.0.0.1:0")
            .stdin(Stdio::null());
        command
    }

    fn start(data_dir: &Path) -> Self {
        let mut child = Self::command(data_dir)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut serve = Self { child, log };
        let mut said = Vec::new();
        while let Some(line) = serve.log.next() {
            said.push(line.unwrap());
            if said
                .last()
                .is_some_and(|line| line.contains("stores are ready"))
            {
                return serve;
            }
        }
        panic!("ended before it was ready: {said:#?}")
    }

    fn refused(command: &mut Command) -> (Option<i32>, String) {
        let Output { status, stderr, .. } = command.output().unwrap();
        (status.code(), String::from_utf8(stderr).unwrap())
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        if self.child.try_wait().unwrap().is_none() {
            kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
            self.child.wait().unwrap();
        }
    }
}

fn redis_url_in(data_dir: &Path) -> String {
    let text = fs::read(data_dir.join("endpoints.json")).unwrap();
    let endpoints: serde_json::Value = serde_json::from_slice(&text).unwrap();
    endpoints["redis_url"].as_str().unwrap().to_owned()
}

/// Pids of the processes whose working directory is in a directory.
fn pids_in(dir: &Path) -> Vec<u32> {
    let dir = dir.canonicalize().unwrap();
    fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| {
            let number = entry.file_name().to_str()?.parse().ok()?;
            let cwd: PathBuf = fs::read_link(entry.path().join("cwd")).ok()?;
            (cwd.starts_with(&dir) && lives(number)).then_some(number)
        })
        .collect()
}

#[tokio::test]
async fn a_killed_serve_is_taken_over_and_a_second_one_is_refused() {
    let dir = passable_dir();
    let data_dir = dir.path().join("data");
    let elsewhere = tempfile::tempdir().unwrap();
    let bystander = RedisOptions {
        throwaway: true,
        ..RedisOptions::new(elsewhere.path(), RedisRole::Journal)
    };
    let bystander = RedisServer::start(bystander).await.unwrap();

    let mut first = Serve::start(&data_dir);
    let (code, line) = Serve::refused(&mut Serve::command(&data_dir));
    assert_eq!(code, Some(1));
    assert!(
        line.contains("in use by another `stockade serve` (pid "),
        "{line}"
    );
    assert_eq!(line.lines().count(), 1, "{line}");

    let url = redis_url_in(&data_dir);
    assert_eq!(redis(&url, "SET order 7"), "+OK");
    // Stopped, it cannot obey the signal that its parent's death sends: a true orphan.
    let orphans = pids_in(&data_dir.join("redis"));
    assert_eq!(orphans.len(), 1);
    kill_process(pid(orphans[0]), Signal::STOP).unwrap();
    first.child.kill().unwrap();
    first.child.wait().unwrap();

    let begun = Instant::now();
    let second = Serve::start(&data_dir);
    assert!(
        begun.elapsed() < Duration::from_secs(30),
        "{:?}",
        begun.elapsed()
    );
    assert!(!lives(orphans[0]));
    assert_eq!(redis_url_in(&data_dir), url);
    assert_eq!(redis(&url, "GET order"), "7");
    assert_eq!(redis(bystander.url().expose_secret(), "PING"), "+PONG");
    assert!(lives(bystander.pid()));

    drop(second);
    assert_eq!(
        pids_in(&data_dir),
        [0; 0],
        "an orderly stop leaves nothing behind"
    );
}

#[test]
fn a_wrong_configuration_ends_with_78_and_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("data");
    for (name, value) in [
        ("REDIS_URL", "redis://127.0.0.1:1"),
        ("STOCKADE_JWT_SECRET", "short"),
        ("STOCKADE_NO_SUCH_KEY", "1"),
    ] {
        let (code, line) = Serve::refused(Serve::command(&data_dir).env(name, value));
        assert_eq!(code, Some(78), "{line}");
        assert!(line.contains(name) && line.lines().count() == 1, "{line}");
    }
    assert!(!data_dir.exists(), "nothing was started");
}
