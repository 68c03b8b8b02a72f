//! `stockade migrate`: brings the schema of PostgreSQL up to date.

use secrecy::ExposeSecret;
use stockade::app;
use stockade::config::Config;
use stockade::store::{Database, DatabaseSettings};

pub(super) fn run(config: &Config) -> anyhow::Result<()> {
    let endpoints = super::endpoints(config)?;
    super::block_on(async {
        let url = endpoints.database_url.expose_secret();
        app::migrate(&Database::new(url, DatabaseSettings::default())?).await
    })
}
