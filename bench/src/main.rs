//! `stockade-bench`: sends a crowd at a running Stockade and proves speed and exactness in one
//! run.
//!
//! Exit codes: 0 every promise was kept, 1 the run could not be made, 2 a promise was broken.

mod client;
mod clock;
mod host;
mod load;
mod operator;
mod report;
mod sale_run;
mod scenarios;
#[cfg(test)]
mod shop;
mod sse;
mod target;
mod verdict;
mod witness;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::report::Verdict;
use crate::scenarios::drop;

const UNUSABLE: u8 = 1;
const VIOLATION: u8 = 2;

/// Sends a crowd at a running Stockade and proves speed and exactness in one run.
#[derive(Debug, Parser)]
#[command(name = "stockade-bench", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Makes a sale of its own on the running server, sends a crowd at it, and says whether
    /// exactly the stock was sold.
    Drop(Box<drop::Args>),
    /// Prints the JSON schema of the documents that runs write.
    Schema,
}

fn main() -> ExitCode {
    // A missing file is no error: then the environment is all there is.
    dotenvy::dotenv().ok();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(usage) => {
            let failed = usage.use_stderr();
            // Nobody is left to tell when the terminal is gone.
            let _ = usage.print();
            return if failed {
                UNUSABLE.into()
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    let args = match cli.command {
        Command::Drop(args) => args,
        Command::Schema => {
            let _ = io::stdout().lock().write_all(report::schema().as_bytes());
            return ExitCode::SUCCESS;
        }
    };
    match drop::run(&args) {
        Ok(run) => {
            let _ = write!(io::stdout().lock(), "{run}");
            if run.verdict == Verdict::Pass {
                ExitCode::SUCCESS
            } else {
                VIOLATION.into()
            }
        }
        Err(error) => {
            let _ = writeln!(io::stderr().lock(), "stockade-bench: {error:#}");
            UNUSABLE.into()
        }
    }
}
