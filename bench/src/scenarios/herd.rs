//! Everybody at the instant of the opening, for a small stock.

use anyhow::Result;

use crate::load::crowd::{Arrivals, Crowd};
use crate::report::{Figure, Run};
use crate::sale_run::Wish;
use crate::trial::{self, Bench, Common};

/// What is asked for.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) common: Common,
    /// People who come.
    #[arg(long, default_value_t = 20_000)]
    pub(crate) buyers: usize,
    /// Units for sale.
    #[arg(long, default_value_t = 500)]
    pub(crate) stock: u64,
    /// Kept-alive connections.
    #[arg(long, default_value_t = 4096)]
    pub(crate) connections: usize,
}

/// Makes the run.
///
/// # Errors
///
/// It could not be made.
pub(crate) fn run(args: &Args) -> Result<Run> {
    trial::run("herd", &args.common, async |bench| steps(bench, args).await)
}

async fn steps(bench: &mut Bench, args: &Args) -> Result<()> {
    bench.set("buyers", args.buyers);
    bench.set("stock", args.stock);
    // Everybody wants one more than the limit allows.
    let crowd = Crowd {
        tries: 2,
        greedy: true,
        ..bench.crowd(args.buyers, Arrivals::Burst)
    };
    let wish = Wish {
        connections: Some(args.connections.min(args.buyers)),
        attach_sse: true,
        ..Wish::new("Herd", crowd, args.stock)
    };
    let trial = bench.trial("herd", wish).await?;
    let sold_out = bench.phase(&trial).speed.as_ref();
    if let Some(after) = sold_out.and_then(|speed| speed.sold_out_after_ms) {
        bench.figure(Figure::new("sold_out_after_ms", after, "ms"));
    }
    Ok(())
}
