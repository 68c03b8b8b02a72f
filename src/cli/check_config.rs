//! `stockade check-config`: every key, what it is now, where that came from, what it means, what it risks.

use std::collections::HashMap;
use std::io::{self, Write};

use stockade::config::{Config, FILE_ENV, KEYS, Stores};

/// Prints the table, then fails as `serve` would.
pub(super) fn run(variables: HashMap<String, String>) -> anyhow::Result<()> {
    let loaded = Config::load_with_sources(variables);
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "{FILE_ENV}: a TOML file with any of these keys in lower case, without STOCKADE_."
    )?;
    for key in KEYS {
        let now = loaded
            .as_ref()
            .ok()
            .and_then(|loaded| Some((loaded.shown(key)?, loaded.source(key)?)));
        writeln!(out)?;
        match now {
            Some((value, source)) => writeln!(out, "{} = {value}  ({source})", key.env)?,
            None => writeln!(
                out,
                "{}  (default: {})",
                key.env,
                key.default.unwrap_or("unset")
            )?,
        }
        for line in key.meaning {
            writeln!(out, "    {}", line.trim())?;
        }
        if key.secret {
            writeln!(
                out,
                "    Secret: {}_FILE may name a file that holds it.",
                key.env
            )?;
        }
        if !key.danger.is_empty() {
            writeln!(out, "    Mind: {}.", key.danger)?;
        }
    }
    writeln!(out)?;
    let stores = match loaded?.config.check_for_serve()? {
        Stores::Embedded => "serve will run its own Redis and PostgreSQL",
        Stores::External(_) => "serve will use the given stores",
    };
    writeln!(out, "The configuration is sound: {stores}.")?;
    Ok(())
}
