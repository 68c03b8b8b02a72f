//! Every purchase is sent several times at once with the same key, and some connections are cut as
//! soon as the request has left: one order each, and the same 201 for every copy.

use anyhow::Result;

use crate::load::crowd::{Arrivals, Crowd};
use crate::report::Run;
use crate::sale_run::Wish;
use crate::trial::{self, Bench, Common};

/// What is asked for.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) common: Common,
    /// People who come.
    #[arg(long, default_value_t = 10_000)]
    pub(crate) buyers: usize,
    /// Units for sale.
    #[arg(long, default_value_t = 5000)]
    pub(crate) stock: u64,
    /// How often each purchase is sent.
    #[arg(long, default_value_t = 4)]
    pub(crate) copies: usize,
    /// Of every so many requests one loses its connection.
    #[arg(long, default_value_t = 20)]
    pub(crate) cuts_every: usize,
}

/// Makes the run.
///
/// # Errors
///
/// It could not be made.
pub(crate) fn run(args: &Args) -> Result<Run> {
    trial::run("retry-storm", &args.common, async |bench| {
        steps(bench, args).await
    })
}

async fn steps(bench: &mut Bench, args: &Args) -> Result<()> {
    bench.set("buyers", args.buyers);
    bench.set("stock", args.stock);
    bench.set("copies", args.copies);
    bench.set("cuts_every", args.cuts_every);
    let crowd = Crowd {
        copies: args.copies.max(1),
        ..bench.crowd(args.buyers, Arrivals::Burst)
    };
    let wish = Wish {
        connections: Some(1024),
        cuts_every: Some(args.cuts_every.max(1)),
        ..Wish::new("Retry storm", crowd, args.stock)
    };
    bench.trial("storm", wish).await?;
    Ok(())
}
