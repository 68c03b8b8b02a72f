//! The command line: one file per subcommand.

mod audit;
mod audit_log;
mod certificate;
mod check_config;
mod data_keys;
mod dead_letters;
mod demo;
mod migrate;
mod openapi;
mod rebuild;
mod serve;
mod user;

use std::collections::HashMap;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::ensure;
use clap::{Parser, Subcommand};
use secrecy::ExposeSecret;
use serde::Serialize;
use stockade::app::Role;
use stockade::config::{Config, ConfigError, Endpoints, LogFormat, Stores};
use stockade::embedded;
use stockade::store::audit_log::Origin;
use stockade::store::{Database, DatabaseSettings};
use tracing_subscriber::EnvFilter;

/// Read in development: variables that the environment does not have.
const DOTENV: &str = ".env";

/// A flash-sale engine: sells exactly the stock, fast, and keeps what it accepted.
///
/// Configured by environment variables and an optional TOML file that `STOCKADE_CONFIG` names;
/// `stockade check-config` lists every key.
#[derive(Debug, Parser)]
#[command(version, about, long_about)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve: all roles in one process; with no stores configured it runs its own Redis and PostgreSQL.
    Serve {
        /// Only these roles, separated by commas; all by default.
        #[arg(long, value_enum, value_delimiter = ',')]
        with: Vec<Role>,
        /// Add a few products and a sale that opens in seconds, for trying things out.
        #[arg(long)]
        demo: bool,
    },
    /// Drain the journal into PostgreSQL: `serve --with writer`.
    Writer,
    /// Bring the schema of PostgreSQL up to date.
    Migrate,
    /// Manage users.
    #[command(subcommand)]
    User(user::UserCommand),
    /// Compare Redis, its journal and PostgreSQL, and say whether every invariant holds.
    ///
    /// Changes nothing. Exit code: 0 all pass, 1 an error, 2 a check fails or a partition is
    /// fenced, 3 not everything is stored yet.
    Audit(audit::AuditArguments),
    /// What people did: list it, or verify that nobody has tampered with it.
    #[command(subcommand)]
    AuditLog(audit_log::AuditLogCommand),
    /// Make a partition anew that stays fenced because acknowledged orders may be lost.
    ///
    /// `--dry-run` first: it says what PostgreSQL, the journal and the nodes have, and what would
    /// be lost. Safe beside running nodes, and twice. Exit code: 0 done or nothing to do, 1 an
    /// error, 2 something would be lost and nothing was done.
    Rebuild(rebuild::RebuildArguments),
    /// What no table would take: list it, or try again after the cause was mended.
    #[command(subcommand)]
    DeadLetters(dead_letters::DeadLettersCommand),
    /// Encrypt users' addresses and names, with other keys than before, or no longer.
    #[command(subcommand)]
    DataKeys(data_keys::DataKeysCommand),
    /// Check what became of a round.
    #[command(subcommand)]
    Certificate(certificate::CertificateCommand),
    /// Print the OpenAPI document.
    Openapi,
    /// Show every key of the configuration with its value, its source and its danger, and check them.
    CheckConfig,
}

/// Runs one subcommand to its end.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    match &arguments.command {
        Command::Serve { with, demo } => {
            let roles = if with.is_empty() {
                Role::ALL
            } else {
                with.as_slice()
            };
            serve::run(configured()?, roles, *demo)
        }
        Command::Writer => serve::run(configured()?, &[Role::Writer], false),
        Command::Migrate => migrate::run(&configured()?),
        Command::User(command) => user::run(command, &configured()?),
        Command::DataKeys(command) => data_keys::run(command, &configured()?),
        Command::Certificate(command) => certificate::run(command),
        Command::Openapi => openapi::run(),
        Command::AuditLog(command) => return audit_log::run(command, &configured()?),
        Command::Audit(arguments) => return audit::run(arguments, &configured()?),
        Command::Rebuild(arguments) => return rebuild::run(arguments, &configured()?),
        Command::DeadLetters(command) => return dead_letters::run(command, &configured()?),
        Command::CheckConfig => check_config::run(variables()?),
    }?;
    Ok(ExitCode::SUCCESS)
}

/// The configuration, with logging set up as it says.
fn configured() -> anyhow::Result<Config> {
    let config = Config::load(variables()?)?;
    log_to_stderr(&config)?;
    Ok(config)
}

/// The stores of the configuration; embedded, those of the server that runs on the data directory.
fn endpoints(config: &Config) -> anyhow::Result<Endpoints> {
    match config.stores()? {
        Stores::External(endpoints) => Ok(endpoints),
        Stores::Embedded => Ok(embedded::running(&config.data_dir)?),
    }
}

/// Runs the work of a subcommand to its end; the audit log knows what it changes as a command's.
fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(Arc::new(Origin::command()).scope(work))
}

/// PostgreSQL, which must have the schema of this version.
async fn migrated(endpoints: &Endpoints, settings: DatabaseSettings) -> anyhow::Result<Database> {
    let database = Database::new(endpoints.database_url.expose_secret(), settings)?;
    ensure!(
        database.migrated().await?,
        "PostgreSQL does not have the schema of this version: run `stockade migrate`"
    );
    Ok(database)
}

/// What `--json` prints: one document, and the end of its line.
fn print_json(out: &mut impl Write, document: &impl Serialize) -> anyhow::Result<()> {
    serde_json::to_writer_pretty(&mut *out, document)?;
    writeln!(out)?;
    Ok(())
}

/// The environment, over `.env` in the working directory if there is one.
fn variables() -> anyhow::Result<HashMap<String, String>> {
    let mut variables = HashMap::new();
    if Path::new(DOTENV).is_file() {
        for pair in dotenvy::from_path_iter(DOTENV)? {
            let (name, value) =
                pair.map_err(|error| ConfigError::File(format!("{DOTENV}: {error}")))?;
            variables.insert(name, value);
        }
    }
    for (name, value) in std::env::vars_os() {
        if let (Ok(name), Ok(value)) = (name.into_string(), value.into_string()) {
            variables.insert(name, value);
        }
    }
    Ok(variables)
}

fn log_to_stderr(config: &Config) -> anyhow::Result<()> {
    let lines = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_new(&config.log)?)
        .with_ansi(std::io::stderr().is_terminal());
    match config.log_format {
        LogFormat::Text => lines.with_writer(|| OneLine(std::io::stderr())).init(),
        LogFormat::Json => lines
            .json()
            .flatten_event(true)
            .with_writer(std::io::stderr)
            .init(),
    }
    Ok(())
}

/// Writes each event as one line, whatever it quotes: nobody can make up a line by what he sends.
struct OneLine<W>(W);

impl<W: Write> Write for OneLine<W> {
    /// Takes a whole event with the end of its line, as the formatter hands them over.
    fn write(&mut self, event: &[u8]) -> std::io::Result<usize> {
        let (text, end) = match event.split_last() {
            Some((b'\n', text)) => (text, &b"\n"[..]),
            _ => (event, &b""[..]),
        };
        let parts: Vec<_> = text.split(|byte| matches!(byte, b'\n' | b'\r')).collect();
        let mut line = parts.join(&b"\\n"[..]);
        line.extend_from_slice(end);
        // In one go: several threads write.
        self.0.write_all(&line)?;
        Ok(event.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line_whatever_it_quotes() {
        let mut out = Vec::new();
        let event = b"WARN refused: x\r\nINFO operator logged in\n";
        OneLine(&mut out).write_all(event).unwrap();
        OneLine(&mut out).write_all(b"INFO next\n").unwrap();
        let text = String::from_utf8(out).unwrap();
        assert_eq!(
            text,
            "WARN refused: x\\n\\nINFO operator logged in\nINFO next\n"
        );
    }
}
