//! `stockade certificate verify`: whether a certificate was signed by one of these keys. Asks nobody.

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Context, bail};
use serde_json::Value;
use stockade::ops::certificate::{key_id, verify};

/// What to do with a certificate.
#[derive(Debug, clap::Subcommand)]
pub(super) enum CertificateCommand {
    /// Verify a certificate, and print what it says.
    Verify {
        /// The answer of GET /v1/sales/{id}/rounds/{round}/certificate, or the JWS in it
        file: PathBuf,
        /// The answer of GET /v1/certificates/keys, from somebody you trust
        #[arg(long, value_name = "FILE")]
        keys: PathBuf,
    },
}

pub(super) fn run(command: &CertificateCommand) -> anyhow::Result<()> {
    let CertificateCommand::Verify { file, keys } = command;
    let read = |path: &PathBuf| {
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
    };
    let text = read(file)?;
    let answer: Option<Value> = serde_json::from_str(&text).ok();
    let jws = match &answer {
        Some(answer) => answer["jws"]
            .as_str()
            .context("the certificate has no jws")?,
        None => text.trim(),
    };
    let keys: Value = serde_json::from_str(&read(keys)?).context("the keys are not JSON")?;
    let id = key_id(jws)?;
    let known = keys["keys"].as_array().into_iter().flatten();
    let Some(key) = known
        .filter(|key| key["kid"] == id.as_str())
        .find_map(|key| key["x"].as_str())
    else {
        bail!("none of the keys is {id}, which signed the certificate");
    };
    let body = verify(jws, key).context("the signature does not hold")?;
    if answer.is_some_and(|answer| answer["certificate"] != body) {
        bail!("what stands beside the signature is not what was signed");
    }
    let mut out = io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, &body)?;
    writeln!(out)?;
    Ok(())
}
