//! What the server's Redis says of itself.

use std::collections::HashMap;

use anyhow::{Context, Result};

/// The answer of `INFO` by field.
pub(crate) async fn info(url: &str) -> Result<HashMap<String, String>> {
    let client = redis::Client::open(url)?;
    let mut connection = client.get_multiplexed_async_connection().await?;
    let answer: String = redis::cmd("INFO").query_async(&mut connection).await?;
    let fields = answer.lines().filter_map(|line| line.split_once(':'));
    Ok(fields
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect())
}

/// Bytes that it has allocated.
pub(crate) async fn used_memory(url: &str) -> Result<u64> {
    let info = info(url).await?;
    let used = info.get("used_memory").context("no used_memory in INFO")?;
    Ok(used.parse()?)
}
