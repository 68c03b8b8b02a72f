//! `stockade`: one binary, its roles as subcommands.

mod cli;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;
use stockade::config::ConfigError;

/// Requests are made of many small pieces, born on one thread and freed on another.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// `EX_CONFIG` of sysexits.h: the configuration is wrong, and starting again will not help.
const EXIT_CONFIGURATION: u8 = 78;

fn main() -> ExitCode {
    match cli::run(&cli::Arguments::parse()) {
        Ok(code) => code,
        // Whoever read our output has seen enough: `stockade check-config | head`.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // There is nobody to tell if standard error is closed.
            let _told = writeln!(io::stderr(), "stockade: {error:#}");
            if error.is::<ConfigError>() {
                ExitCode::from(EXIT_CONFIGURATION)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
