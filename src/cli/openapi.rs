//! `stockade openapi`: prints the OpenAPI document, which is generated from the code.

use std::io::{self, Write};

pub(super) fn run() -> anyhow::Result<()> {
    let document = stockade::http::openapi().to_pretty_json()?;
    writeln!(io::stdout(), "{document}")?;
    Ok(())
}
