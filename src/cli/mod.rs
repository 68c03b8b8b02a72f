//! The command line: one file per subcommand.

mod check_config;
mod serve;

use std::collections::HashMap;
use std::io::IsTerminal;
use std::path::Path;

use clap::{Parser, Subcommand};
use stockade::config::{Config, ConfigError, LogFormat};
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
    Serve,
    /// Show every key of the configuration with its value, its source and its danger, and check them.
    CheckConfig,
}

/// Runs one subcommand to its end.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    match arguments.command {
        Command::Serve => {
            let config = Config::load(variables()?)?;
            log_to_stderr(&config)?;
            serve::run(config)
        }
        Command::CheckConfig => check_config::run(variables()?),
    }
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
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match config.log_format {
        LogFormat::Text => lines.init(),
        LogFormat::Json => lines.json().flatten_event(true).init(),
    }
    Ok(())
}
