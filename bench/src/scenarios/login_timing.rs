//! Whether the time of a refused login tells that its account exists: wrong passwords for accounts
//! that there are and for accounts that there are not, in turn.

use std::time::Instant;

use anyhow::{Result, ensure};
use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Request, StatusCode};

use crate::client::Connection;
use crate::report::{Figure, Run, ms};
use crate::trial::{self, Bench, Common, median};

/// Accounts that exist; as many names belong to nobody.
const ACCOUNTS: u32 = 100;

/// Logins of each kind before those that count: connections, caches and statements are new.
const WARM_UP: u32 = 20;

/// What is asked for.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Logins of each of the two kinds, at some 55 ms each.
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(2..=1_000_000))]
    pub(crate) logins: u32,
}

/// Makes the run.
///
/// # Errors
///
/// It could not be made, or the two kinds are not answered alike.
pub(crate) fn run(args: &Args) -> Result<Run> {
    trial::run("login-timing", &args.common, async |bench| {
        steps(bench, args).await
    })
}

async fn steps(bench: &mut Bench, args: &Args) -> Result<()> {
    bench.set("logins", args.logins);
    let address = bench.server.target.address;
    let mut connection = Connection::open(address).await?;
    let mut ask = async |path: &str, body: String| {
        let request = Request::post(path)
            .header(HOST, address.to_string())
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))?;
        let sent = Instant::now();
        let answer = connection.exchange(request).await?;
        anyhow::Ok((answer.status(), answer.into_body(), sent.elapsed()))
    };
    for account in 0..ACCOUNTS {
        let email = email(true, account);
        let body = format!(r#"{{"email":"{email}","password":"the right one","name":"Ada"}}"#);
        let (status, said, _) = ask("/v1/auth/register", body).await?;
        ensure!(status == StatusCode::CREATED, "{status} {said:?}");
    }
    let mut times = [Vec::new(), Vec::new()];
    for turn in 0..WARM_UP + args.logins {
        // Neither kind is always the second.
        let first = turn % 2 == 0;
        for exists in [first, !first] {
            let email = email(exists, turn % ACCOUNTS);
            let body = format!(r#"{{"email":"{email}","password":"the wrong one"}}"#);
            let (status, said, took) = ask("/v1/auth/login", body).await?;
            ensure!(status == StatusCode::UNAUTHORIZED, "{status} {said:?}");
            if turn >= WARM_UP {
                times[usize::from(exists)].push(ms(took));
            }
        }
    }
    let [unknown, known] = times;
    let welch_t = welch_t(&known, &unknown);
    let (known, unknown) = (median(known), median(unknown));
    bench.figure(Figure::new("known_ms", known, "ms"));
    bench.figure(Figure::new("unknown_ms", unknown, "ms"));
    bench.figure(Figure::new("difference_ms", (known - unknown).abs(), "ms"));
    bench.figure(Figure::new("welch_t", welch_t, ""));
    Ok(())
}

/// Addresses of both kinds look alike.
fn email(exists: bool, number: u32) -> String {
    let domain = if exists { "here" } else { "gone" };
    format!("user{number:04}@{domain}.example")
}

/// Welch's t of two samples: beyond some ±3 their means hardly differ by chance.
fn welch_t(one: &[f64], other: &[f64]) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
    let moments = |sample: &[f64]| {
        let count = sample.len() as f64;
        let mean = sample.iter().sum::<f64>() / count;
        let squares: f64 = sample.iter().map(|value| (value - mean).powi(2)).sum();
        (mean, squares / (count - 1.0) / count)
    };
    let ((mean, error), (other_mean, other_error)) = (moments(one), moments(other));
    (mean - other_mean) / (error + other_error).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn welch_t_is_the_difference_in_standard_errors() {
        let sample = |mean: f64, spread: f64| {
            let ends = [mean - spread, mean, mean + spread];
            ends.repeat(5)
        };
        let (one, other) = (sample(20.0, 3.0), sample(24.0, 1.0));
        // The variances are 90/14 and 10/14.
        let expected = -4.0 / ((90.0 / 14.0 + 10.0 / 14.0) / 15.0_f64).sqrt();
        assert!((welch_t(&one, &other) - expected).abs() < 1e-9);
        assert!((welch_t(&one, &one)).abs() < 1e-9);
    }
}
