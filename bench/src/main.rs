//! `stockade-bench`: sends a crowd at a running Stockade and proves speed and exactness in one
//! run.
//!
//! Exit codes: 0 every promise was kept, 1 the run could not be made, 2 a promise was broken, 3 a
//! bound was not kept.

mod baseline;
mod client;
mod clock;
mod floor;
mod host;
mod load;
mod operator;
mod redis_info;
mod report;
mod sale_run;
mod scenarios;
#[cfg(test)]
mod shop;
mod sse;
mod stage;
mod target;
mod trial;
mod usage;
mod verdict;
mod witness;

use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::report::{CompareArgs, Document, End, Output, PlotArgs, ReportArgs, Run, Suite};
use crate::scenarios::{
    baselines, canonical, drain, drop, herd, hold_pay_expire, ladder, login_flood, login_timing,
    many_sales, retry_storm, scale, soak, soldout, sse as live, suite,
};

const UNUSABLE: u8 = 1;
const VIOLATION: u8 = 2;
const MISSED: u8 = 3;

/// Sends crowds at a Stockade and proves speed and exactness in one run. Without a scenario it makes
/// the canonical run: the one to quote.
#[derive(Debug, Parser)]
#[command(
    name = "stockade-bench",
    version,
    args_conflicts_with_subcommands = true
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    canonical: Box<Scenario<canonical::Args>>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The run to quote: the highest rate with the writer draining and paused, latencies at 70 % of
    /// it, and a stock that is sold to the last unit.
    Canonical(Box<Scenario<canonical::Args>>),
    /// Makes a sale of its own on the running server, sends a crowd at it, and says whether
    /// exactly the stock was sold.
    Drop(Box<Scenario<drop::Args>>),
    /// Everybody at the instant of the opening, for a small stock.
    Herd(Box<Scenario<herd::Args>>),
    /// Orders that wait for their payment: a third is never paid, and in the end all is sold.
    HoldPayExpire(Box<Scenario<hold_pay_expire::Args>>),
    /// Refusals per second once everything is sold, and every retry of an order still its 201.
    Soldout(Box<Scenario<soldout::Args>>),
    /// Every purchase several times at once with one key, and connections that are cut.
    RetryStorm(Box<Scenario<retry_storm::Args>>),
    /// Purchases without and with a flood of logins beside them, in turn.
    LoginFlood(Box<Scenario<login_flood::Args>>),
    /// Whether the time of a refused login tells that the account exists.
    LoginTiming(Box<Scenario<login_timing::Args>>),
    /// Many sales that open at the same instant.
    ManySales(Box<Scenario<many_sales::Args>>),
    /// A million orders at 70 % of the highest rate, and how far the writer falls behind.
    Drain(Box<Scenario<drain::Args>>),
    /// A long run at half the highest rate: memory, and whether it gets slower.
    Soak(Box<Scenario<soak::Args>>),
    /// Rates that grow until the server no longer keeps up, then 80 % of that.
    Ladder(Box<Scenario<ladder::Args>>),
    /// What a purchase costs in a round of a thousand units, and in one of ten million.
    Scale(Box<Scenario<scale::Args>>),
    /// Stockade beside the designs that it is compared with, in turns, on the same stores.
    Baselines(Box<Scenario<baselines::Args>>),
    /// The script alone on a bare Redis, and the writer beside `COPY` of the same rows.
    Floor(Box<Scenario<scenarios::floor::Args>>),
    /// Every goal: all scenarios that measure one, and the table that follows.
    Suite(Box<Scenario<suite::Args>>),
    /// Prints the report of a document as one HTML page, which needs no network.
    Report(ReportArgs),
    /// Writes the plots of a document as SVG files.
    Plot(PlotArgs),
    /// Compares two builds by the documents of their runs, with confidence intervals.
    Compare(CompareArgs),
    /// Live stock for as many subscribers as files allow: memory, age of what they see, and a
    /// storm of reconnects.
    Sse(Box<Scenario<live::Args>>),
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
    match run(cli.command.unwrap_or(Command::Canonical(cli.canonical))) {
        Ok(End::Good) => ExitCode::SUCCESS,
        Ok(End::Violation) => VIOLATION.into(),
        Ok(End::Missed) => MISSED.into(),
        Err(error) => {
            let _ = writeln!(io::stderr().lock(), "stockade-bench: {error:#}");
            UNUSABLE.into()
        }
    }
}

/// What a scenario takes, and where its document goes.
#[derive(Debug, clap::Args)]
struct Scenario<A: clap::Args> {
    #[command(flatten)]
    args: A,
    #[command(flatten)]
    output: Output,
}

impl<A: clap::Args> Scenario<A> {
    /// Makes the run and puts it out.
    fn run(&self, run: impl FnOnce(&A) -> Result<Run>) -> Result<End> {
        let run = run(&self.args)?;
        self.output.deliver(&Document::Run(Box::new(run)))
    }

    /// The same of several runs.
    fn run_suite(&self, suite: impl FnOnce(&A) -> Result<Suite>) -> Result<End> {
        let suite = suite(&self.args)?;
        self.output.deliver(&Document::Suite(Box::new(suite)))
    }
}

fn run(command: Command) -> Result<End> {
    match command {
        Command::Canonical(scenario) => scenario.run(canonical::run),
        Command::Drop(scenario) => scenario.run(drop::run),
        Command::Herd(scenario) => scenario.run(herd::run),
        Command::HoldPayExpire(scenario) => scenario.run(hold_pay_expire::run),
        Command::Soldout(scenario) => scenario.run(soldout::run),
        Command::RetryStorm(scenario) => scenario.run(retry_storm::run),
        Command::LoginFlood(scenario) => scenario.run(login_flood::run),
        Command::LoginTiming(scenario) => scenario.run(login_timing::run),
        Command::ManySales(scenario) => scenario.run(many_sales::run),
        Command::Drain(scenario) => scenario.run(drain::run),
        Command::Soak(scenario) => scenario.run(soak::run),
        Command::Ladder(scenario) => scenario.run(ladder::run),
        Command::Scale(scenario) => scenario.run(scale::run),
        Command::Baselines(scenario) => scenario.run(baselines::run),
        Command::Floor(scenario) => scenario.run(scenarios::floor::run),
        Command::Suite(scenario) => scenario.run_suite(suite::run),
        Command::Report(args) => args.run(),
        Command::Plot(args) => args.run(),
        Command::Compare(args) => args.run(),
        Command::Sse(scenario) => scenario.run(live::run),
        Command::Schema => {
            let _ = io::stdout().lock().write_all(report::schema().as_bytes());
            Ok(End::Good)
        }
    }
}
