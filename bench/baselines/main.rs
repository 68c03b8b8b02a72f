//! `stockade-baseline`: what Stockade is compared with. Each subcommand is another way to build the
//! same service; all serve the same route with the same answers, so that the same client drives them.

mod clock;
mod hello;
mod naive;
mod postgres;
mod route;

use std::collections::HashMap;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::process::ExitCode;

use anyhow::{Context, Result};
use axum::Router;
use axum::serve::ListenerExt;
use clap::{Parser, Subcommand};
use rustix::process::{
    Resource, Rlimit, Signal, getrlimit, set_parent_process_death_signal, setrlimit,
};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use uuid::Uuid;

/// Stockade's, so that no design is slower for want of it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Designs that Stockade is compared with, behind the same route.
#[derive(Debug, Parser)]
#[command(name = "stockade-baseline", version)]
struct Cli {
    /// Where to listen; the address that it becomes is the only line of standard output.
    #[arg(long, global = true, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    #[command(subcommand)]
    design: Design,
}

#[derive(Debug, Subcommand)]
enum Design {
    /// Answers a constant 201 of the size and with the headers of Stockade's: the least that a
    /// request can cost.
    Hello,
    /// One script call for each request, and a worker that moves the stream to `PostgreSQL`.
    Naive(naive::Args),
    /// `SELECT … FOR UPDATE` on the row with the stock.
    RowLocks(postgres::Args),
    /// The same in one call of a function in `PostgreSQL`.
    StoredFunction(postgres::Args),
}

/// What is sold, and to whom.
#[derive(Clone, Debug, clap::Args)]
struct Shop {
    /// A sale and its stock, such as 6f1c…=10000; once for each sale.
    #[arg(long = "sale", required = true, value_parser = sale)]
    sales: Vec<(Uuid, u32)>,
    /// Units that one buyer may have.
    #[arg(long, default_value_t = 1)]
    limit: u32,
    /// The secret that signs the buyers' tokens.
    #[arg(long, env = "STOCKADE_JWT_SECRET", hide_env_values = true)]
    secret: String,
}

fn sale(text: &str) -> Result<(Uuid, u32)> {
    let (id, stock) = text.split_once('=').context("a sale is ID=STOCK")?;
    Ok((id.parse()?, stock.parse()?))
}

impl Shop {
    fn stock(&self) -> HashMap<Uuid, u32> {
        self.sales.iter().copied().collect()
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    // Nobody else would end it.
    let _ = set_parent_process_death_signal(Some(Signal::TERM));
    let outcome = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(Into::into)
        .and_then(|runtime| runtime.block_on(run(cli)));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr().lock(), "stockade-baseline: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(cli: Cli) -> Result<()> {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, raised)?;
    match cli.design {
        Design::Hello => serve(cli.listen, hello::router()).await,
        Design::Naive(args) => {
            let naive = naive::Naive::start(&args).await?;
            let served = serve(cli.listen, route::router(naive.clone(), &args.shop.secret)).await;
            naive.clear().await.and(served)
        }
        Design::RowLocks(args) => {
            let (design, stores) = postgres::RowLocks::start(&args).await?;
            let served = serve(cli.listen, route::router(design, &args.shop.secret)).await;
            stores.drop().await.and(served)
        }
        Design::StoredFunction(args) => {
            let (design, stores) = postgres::StoredFunction::start(&args).await?;
            let served = serve(cli.listen, route::router(design, &args.shop.secret)).await;
            stores.drop().await.and(served)
        }
    }
}

/// Serves as Stockade does, until SIGTERM or SIGINT.
async fn serve(address: SocketAddr, router: Router) -> Result<()> {
    let (mut terminate, mut interrupt) = (
        signal(SignalKind::terminate())?,
        signal(SignalKind::interrupt())?,
    );
    let listener = TcpListener::bind(address).await?;
    writeln!(io::stdout().lock(), "http://{}", listener.local_addr()?)?;
    let listener = listener.tap_io(|stream| {
        let _ = stream.set_nodelay(true);
    });
    let service = router.into_make_service_with_connect_info::<SocketAddr>();
    tokio::select! {
        served = async { axum::serve(listener, service).await } => Ok(served?),
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    }
}
