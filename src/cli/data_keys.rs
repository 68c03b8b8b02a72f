//! `stockade data-keys`: users' addresses and names are stored as the keys say.

use std::io::{self, Write};
use std::sync::Arc;

use anyhow::ensure;
use clap::Subcommand;
use stockade::config::Config;
use stockade::store::DatabaseSettings;
use stockade::store::users::Users;
use uuid::Uuid;

/// Users in one transaction: their rows are locked for some milliseconds.
const BATCH: i64 = 500;

/// What to do with the keys.
#[derive(Debug, Subcommand)]
pub(super) enum DataKeysCommand {
    /// Store every user as `STOCKADE_DATA_KEYS` says: encrypted with its first key, or plain if it is
    /// unset or begins with `plain,`. Safe beside running nodes; may be interrupted and run again.
    Rotate,
}

pub(super) fn run(command: &DataKeysCommand, config: &Config) -> anyhow::Result<()> {
    let DataKeysCommand::Rotate = command;
    let endpoints = super::endpoints(config)?;
    let keys = Arc::new(config.data_keys()?);
    super::block_on(async {
        let database = super::migrated(&endpoints, DatabaseSettings::default()).await?;
        let users = Users::new(database, Arc::clone(&keys));
        let missing = users.missing_keys().await?;
        ensure!(
            missing.is_empty(),
            "users are encrypted with key {}, which STOCKADE_DATA_KEYS lacks or has with another secret",
            missing
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(", ")
        );
        let (mut after, mut done) = (Uuid::nil(), 0);
        while let Some((last, count)) = users.reseal(after, BATCH).await? {
            (after, done) = (last, done + count);
        }
        let stored = match keys.sealing() {
            Some(number) => format!("encrypted with key {number}"),
            None => "stored plain".to_owned(),
        };
        writeln!(
            io::stdout(),
            "{done} users are now {stored}, all others were before"
        )?;
        Ok(())
    })
}
