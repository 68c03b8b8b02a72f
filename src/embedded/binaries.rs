//! Finds the programs of the services: in PATH, and where Debian keeps PostgreSQL's.

use std::cmp::Reverse;
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::EmbeddedError;

/// Where Debian installs each major version of PostgreSQL.
const DEBIAN_POSTGRESQL: &str = "/usr/lib/postgresql";
/// Looked through after PATH, which a service manager may have set short.
const USUAL: [&str; 4] = ["/usr/local/bin", "/usr/local/sbin", "/usr/bin", "/usr/sbin"];

/// PostgreSQL's programs of one version.
#[derive(Debug)]
pub(super) struct Postgres {
    pub(super) postgres: PathBuf,
    pub(super) initdb: PathBuf,
}

/// `redis-server`, or else `valkey-server`.
pub(super) fn redis_server() -> Result<PathBuf, EmbeddedError> {
    find("redis-server")
        .or_else(|| find("valkey-server"))
        .ok_or_else(|| missing("redis-server (or valkey-server)", "redis-server"))
}

/// The program that drops privileges and ties a child to its parent's life.
pub(super) fn setpriv() -> Result<PathBuf, EmbeddedError> {
    find("setpriv").ok_or_else(|| missing("setpriv", "util-linux"))
}

/// The newest PostgreSQL, or the one of the major version that an existing cluster needs.
pub(super) fn postgres(major: Option<&str>) -> Result<Postgres, EmbeddedError> {
    let from_path = find("postgres").and_then(|path| path.canonicalize().ok());
    from_path
        .into_iter()
        .chain(debian_newest_first())
        .filter_map(|postgres| {
            let initdb = postgres.with_file_name("initdb");
            initdb.is_file().then_some(Postgres { postgres, initdb })
        })
        .find(|found| major.is_none_or(|major| version(&found.postgres).as_deref() == Some(major)))
        .ok_or_else(|| match major {
            Some(major) => missing(
                &format!("PostgreSQL {major}, which made this data directory,"),
                &format!("postgresql-{major}"),
            ),
            None => missing("postgres", "postgresql"),
        })
}

fn missing(program: &str, package: &str) -> EmbeddedError {
    EmbeddedError::Missing {
        program: program.to_owned(),
        package: package.to_owned(),
    }
}

fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(USUAL.iter().map(PathBuf::from))
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file())
}

fn debian_newest_first() -> Vec<PathBuf> {
    let mut found: Vec<(u32, PathBuf)> = Path::new(DEBIAN_POSTGRESQL)
        .read_dir()
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let major = entry.file_name().to_str()?.parse().ok()?;
            let postgres = entry.path().join("bin/postgres");
            postgres.is_file().then_some((major, postgres))
        })
        .collect();
    found.sort_by_key(|(major, _)| Reverse(*major));
    found.into_iter().map(|(_, postgres)| postgres).collect()
}

/// The major version, from a line such as `postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)`.
fn version(postgres: &Path) -> Option<String> {
    let output = Command::new(postgres).arg("--version").output().ok()?;
    let line = String::from_utf8(output.stdout).ok()?;
    let number = line
        .split_whitespace()
        .find(|word| word.starts_with(|first: char| first.is_ascii_digit()))?;
    let digits = number
        .find(|letter: char| !letter.is_ascii_digit())
        .unwrap_or(number.len());
    Some(number[..digits].to_owned())
}
