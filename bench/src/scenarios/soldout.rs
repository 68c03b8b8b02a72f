//! What a server does once everything is gone: how many refusals a second it gives to people who
//! never had an order, while every retry of an accepted order still gets its 201.

use std::time::Duration;

use anyhow::Result;

use super::canonical::{SATURATING, saturate};
use crate::load::crowd::Arrivals;
use crate::report::{Figure, Run};
use crate::sale_run::Wish;
use crate::trial::{self, Bench, Common, requests};

/// What is asked for.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Units for sale, and so orders that are tried again.
    #[arg(long, default_value_t = 2000)]
    pub(crate) stock: u64,
    /// How long it refuses, about.
    #[arg(long = "for", default_value = "5s", value_parser = humantime::parse_duration)]
    pub(crate) lasts: Duration,
}

/// Refusals are cheaper than acceptances by about this much.
const CHEAPER: f64 = 2.0;

/// Makes the run.
///
/// # Errors
///
/// It could not be made.
pub(crate) fn run(args: &Args) -> Result<Run> {
    trial::run("soldout", &args.common, async |bench| {
        steps(bench, args).await
    })
}

async fn steps(bench: &mut Bench, args: &Args) -> Result<()> {
    bench.set("stock", args.stock);
    let warm = saturate(bench, "warm-up", 4000).await?.accepted_per_s;
    let buyers = requests(warm * CHEAPER, args.lasts).max(usize::try_from(args.stock)? * 4);
    let crowd = bench.crowd(buyers, Arrivals::Burst);
    let wish = Wish {
        connections: Some(SATURATING),
        patience: Duration::from_mins(5),
        // Every single one.
        replays: usize::try_from(args.stock)?,
        ..Wish::new("Sold out", crowd, args.stock)
    };
    let trial = bench.trial("sold out", wish).await?;
    let refusals = trial.crowded.refusals_per_s("sold_out");
    bench.figure(Figure::new("refusals_per_s", refusals, "/s"));
    Ok(())
}
