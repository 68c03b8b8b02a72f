//! Logins that nobody can use, five hundred a second, beside people who buy: what the purchases
//! notice. Without and with the flood in turn, at the same rate of purchases.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::Result;
use bytes::Bytes;
use http_body_util::Full;
use hyper::Request;
use hyper::header::{CONTENT_TYPE, HOST};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

use crate::client;
use crate::load::crowd::Arrivals;
use crate::report::{Figure, Percentiles, Run};
use crate::sale_run::Wish;
use crate::trial::{self, Bench, Common, median, requests};

/// Limits are on; but the crowd of buyers comes from one machine, and whoever floods says through a
/// proxy where he is. The operator asks as often as a harness does.
const ENVIRONMENT: [&str; 4] = [
    "STOCKADE_RATE_LIMIT=on",
    "STOCKADE_TRUSTED_PROXIES=127.0.0.0/8",
    "STOCKADE_UNLIMITED_ADDRESSES=127.0.0.0/8",
    "STOCKADE_LIMITS=user.operate=off",
];

/// Time for one login.
const PATIENCE: Duration = Duration::from_secs(10);

/// Accounts that are tried; there is none of them.
const ACCOUNTS: u32 = 1_000;

/// What is asked for.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Purchases per second.
    #[arg(long, default_value_t = 2_000.0)]
    pub(crate) rate: f64,
    /// Logins per second.
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) logins: u32,
    /// Addresses that they come from.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) addresses: u32,
    /// How long each turn lasts.
    #[arg(long, default_value = "10s", value_parser = humantime::parse_duration)]
    pub(crate) each: Duration,
    /// Turns with the flood; there is one more without.
    #[arg(long, default_value_t = 2)]
    pub(crate) turns: usize,
}

/// Makes the run.
///
/// # Errors
///
/// It could not be made.
pub(crate) fn run(args: &Args) -> Result<Run> {
    let mut common = args.common.clone();
    let wanted = std::mem::take(&mut common.place.server_env);
    let environment = ENVIRONMENT.map(str::to_owned).into_iter();
    common.place.server_env = environment.chain(wanted).collect();
    trial::run("login-flood", &common, async |bench| {
        steps(bench, args).await
    })
}

async fn steps(bench: &mut Bench, args: &Args) -> Result<()> {
    bench.set("rate", args.rate);
    bench.set("logins_per_s", args.logins);
    bench.set("addresses", args.addresses);
    // Caches, connections and pages of memory are not what is measured.
    turn(bench, args, "warm-up").await?;
    let mut calm = vec![turn(bench, args, "calm").await?];
    let mut flooded = Vec::new();
    let mut answers: BTreeMap<u16, u32> = BTreeMap::new();
    for _ in 0..args.turns {
        let (stop, stopped) = oneshot::channel();
        let flood = tokio::spawn(flood(bench.server.target.address, args.clone(), stopped));
        let p99 = turn(bench, args, "flood").await;
        // Dropped or sent, it is the end.
        let _ = stop.send(());
        for (status, count) in flood.await? {
            *answers.entry(status).or_insert(0) += count;
        }
        flooded.push(p99?);
        calm.push(turn(bench, args, "calm").await?);
    }
    for (status, count) in answers {
        let name = format!("logins_answered_{status}");
        bench.figure(Figure::new(name, f64::from(count), ""));
    }
    let (calm, flooded) = (median(calm), median(flooded));
    bench.figure(Figure::new("p99_calm_ms", calm, "ms"));
    bench.figure(Figure::new("p99_flooded_ms", flooded, "ms"));
    bench.figure(Figure::new("flooded_to_calm", flooded / calm, "×"));
    Ok(())
}

/// One crowd that buys at a steady rate; the p99 of its purchases, in milliseconds.
async fn turn(bench: &mut Bench, args: &Args, name: &str) -> Result<f64> {
    let buyers = requests(args.rate, args.each);
    let crowd = bench.crowd(buyers, Arrivals::Rate(args.rate));
    let stock = crowd.purchases() as u64;
    let trial = bench
        .trial(name, Wish::new("Login flood", crowd, stock))
        .await?;
    let records = trial.crowded.records.iter();
    let latencies = records.map(|record| record.finished.saturating_sub(record.due));
    Ok(Percentiles::of(latencies)?.p99)
}

/// Tries passwords until it is stopped, whether or not the last ones were answered. Gives how many
/// answers of each status there were; 0 is none.
async fn flood(
    address: SocketAddr,
    args: Args,
    mut stopped: oneshot::Receiver<()>,
) -> BTreeMap<u16, u32> {
    let mut ticks = interval(Duration::from_secs(1) / args.logins);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let (mut trying, mut answers) = (JoinSet::new(), BTreeMap::new());
    let mut number = 0_u32;
    loop {
        tokio::select! {
            biased;
            _ = &mut stopped => break,
            Some(status) = trying.join_next() => {
                *answers.entry(status.unwrap_or(0)).or_insert(0) += 1;
            }
            _ = ticks.tick() => {
                trying.spawn(attempt(address, number, number % args.addresses));
                number = number.wrapping_add(1);
            }
        }
    }
    answers
}

/// One login, on a connection of its own; its status, or 0.
async fn attempt(address: SocketAddr, number: u32, from: u32) -> u16 {
    let from = Ipv4Addr::from_bits(Ipv4Addr::new(100, 64, 0, 0).to_bits() + from);
    let account = number % ACCOUNTS;
    let body = format!(r#"{{"email":"{account}@example.org","password":"not the password"}}"#);
    let request = Request::post("/v1/auth/login")
        .header(HOST, address.to_string())
        .header(CONTENT_TYPE, "application/json")
        .header("x-forwarded-for", from.to_string())
        .body(Full::new(Bytes::from(body)));
    let Ok(request) = request else { return 0 };
    let answer = client::call(address, request, PATIENCE).await;
    answer.map_or(0, |answer| answer.status().as_u16())
}
