//! The designs that Stockade is compared with, each as a process on the stores of the run's stage, and
//! the check that each of them really sells.

use std::collections::{BTreeSet, HashMap};
use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use serde::Deserialize;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tokio::time::timeout;
use uuid::Uuid;

use crate::load::outcome::Outcome;
use crate::load::sender::Record;
use crate::stage::Process;
use crate::target::{Endpoints, Target};
use crate::usage::{Family, Roots};

/// The program with all of them but Node's.
const PROGRAM: &str = "stockade-baseline";

/// How long one may take to start: a cluster of Node takes longest.
const START_MAX: Duration = Duration::from_secs(20);

/// More than any run sells.
const STOCK: u32 = 1_000_000_000;

/// Units of the sale that the check empties.
pub(crate) const CHECK_STOCK: usize = 150;

/// A design.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Design {
    Hello,
    Naive,
    RowLocks,
    StoredFunction,
    Node,
}

impl Design {
    pub(crate) const ALL: [Self; 5] = [
        Self::Hello,
        Self::Naive,
        Self::RowLocks,
        Self::StoredFunction,
        Self::Node,
    ];

    /// Its name in a report.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Hello => "hello",
            Self::Naive => "naive",
            Self::RowLocks => "row locks",
            Self::StoredFunction => "stored function",
            Self::Node => "node",
        }
    }

    /// Whether it sells, and has rows to show for it.
    pub(crate) fn sells(self) -> bool {
        self != Self::Hello
    }

    /// The schema of its tables.
    fn schema(self) -> &'static str {
        match self {
            Self::Hello => "",
            Self::Naive => "baseline_naive",
            Self::RowLocks => "baseline_row_locks",
            Self::StoredFunction => "baseline_stored_function",
            Self::Node => "baseline_node",
        }
    }

    /// The command that starts it, or one line that says why it cannot be.
    fn command(self, endpoints: &Endpoints) -> Result<Command> {
        let mut command = match self {
            Self::Node => {
                let mut command = Command::new("node");
                command.arg(node()?);
                command
            }
            _ => Command::new(env::current_exe()?.with_file_name(PROGRAM)),
        };
        match self {
            Self::Hello => {
                command.arg("hello");
            }
            Self::Naive => {
                command.arg("naive");
            }
            Self::RowLocks => {
                command.arg("row-locks");
            }
            Self::StoredFunction => {
                command.arg("stored-function");
            }
            Self::Node => {}
        }
        if matches!(self, Self::Naive | Self::Node) {
            command.args(["--redis-url", &endpoints.redis_url]);
        }
        if self.sells() {
            command.args(["--database-url", &endpoints.database_url]);
        }
        Ok(command)
    }
}

/// Where the Node service is: in the work tree that this program was built in, or is started in.
fn node() -> Result<PathBuf> {
    let works = Command::new("node")
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    ensure!(
        works.is_ok_and(|status| status.success()),
        "there is no node"
    );
    let places = [
        Path::new(env!("CARGO_MANIFEST_DIR")).join("baselines/node"),
        PathBuf::from("bench/baselines/node"),
    ];
    let place = places.iter().find(|place| place.join("main.js").exists());
    let place = place.context("bench/baselines/node is not here")?;
    ensure!(
        place.join("node_modules").exists(),
        "its packages are missing: run `npm ci` in bench/baselines/node"
    );
    Ok(place.join("main.js"))
}

/// A design that runs. It takes what it stored away when this is dropped.
pub(crate) struct Baseline {
    pub(crate) design: Design,
    pub(crate) target: Target,
    pub(crate) sale: Uuid,
    pub(crate) check_sale: Uuid,
    /// Itself, and what it started.
    pub(crate) roots: Roots,
    database: String,
    _process: Process,
}

impl Baseline {
    /// Starts one.
    ///
    /// # Errors
    ///
    /// It is not there, or did not start.
    pub(crate) async fn start(design: Design, endpoints: &Endpoints, secret: &str) -> Result<Self> {
        let (sale, check_sale) = (
            Uuid::from_u128(rand::random()),
            Uuid::from_u128(rand::random()),
        );
        let mut command = design.command(endpoints)?;
        if design.sells() {
            command
                .args(["--sale", &format!("{sale}={STOCK}")])
                .args(["--sale", &format!("{check_sale}={CHECK_STOCK}")]);
        }
        command
            .env("STOCKADE_JWT_SECRET", secret)
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let mut process = Process::spawn(&mut command)?;
        let Ok(Ok(url)) = timeout(START_MAX, process.said()).await else {
            bail!("{} did not start", design.name());
        };
        Ok(Self {
            design,
            target: Target::parse(&url)?,
            sale,
            check_sale,
            roots: Roots {
                families: vec![(Family::Application, process.pid)],
                redis_port: None,
            },
            database: endpoints.database_url.clone(),
            _process: process,
        })
    }

    /// Rows that it has of a sale.
    ///
    /// # Errors
    ///
    /// They cannot be counted.
    pub(crate) async fn rows(&self, sale: Uuid) -> Result<u64> {
        let mut connection = PgConnection::connect(&self.database).await?;
        let schema = self.design.schema();
        let count = format!("SELECT count(*) FROM {schema}.orders WHERE sale_id = $1");
        let rows: i64 = sqlx::query_scalar(AssertSqlSafe(count))
            .bind(sale)
            .fetch_one(&mut connection)
            .await?;
        connection.close().await?;
        Ok(rows.cast_unsigned())
    }
}

/// What an order of any design says.
#[derive(Deserialize)]
struct Order {
    id: Uuid,
    buyer_id: Uuid,
    seq: usize,
}

/// Whether a sale with [`CHECK_STOCK`] units and a limit of one, at which every buyer came twice with
/// two keys, sold what it should; `again` is the same crowd once more.
///
/// # Errors
///
/// What it did wrong.
pub(crate) fn check(first: &[Record], again: &[Record]) -> Result<()> {
    let accepted = |records: &[Record], replays: bool| -> HashMap<usize, Bytes> {
        let accepted = records.iter().filter_map(|record| match &record.outcome {
            Outcome::Accepted { replayed, body } if *replayed == replays => {
                Some((record.purchase, body.clone()))
            }
            _ => None,
        });
        accepted.collect()
    };
    let bodies = accepted(first, false);
    ensure!(
        bodies.len() == CHECK_STOCK,
        "it sold {} of {CHECK_STOCK} units",
        bodies.len()
    );
    let orders: Vec<Order> = bodies
        .values()
        .map(|body| serde_json::from_slice(body))
        .collect::<Result<_, _>>()?;
    let distinct = |ids: BTreeSet<Uuid>| ids.len() == orders.len();
    ensure!(
        distinct(orders.iter().map(|order| order.buyer_id).collect()),
        "a buyer has more than the limit"
    );
    ensure!(
        distinct(orders.iter().map(|order| order.id).collect()),
        "two purchases have one order"
    );
    let seqs: BTreeSet<usize> = orders.iter().map(|order| order.seq).collect();
    ensure!(
        seqs.iter().copied().eq(1..=CHECK_STOCK),
        "the numbers of its orders have gaps"
    );
    ensure!(
        accepted(again, true) == bodies && accepted(again, false).is_empty(),
        "a retry with the same key got another answer"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(purchase: usize, replayed: bool, buyer: usize, seq: usize) -> Record {
        let (id, buyer) = (Uuid::from_u128(seq as u128), Uuid::from_u128(buyer as u128));
        let body = format!(r#"{{"id":"{id}","buyer_id":"{buyer}","seq":{seq}}}"#);
        Record {
            purchase,
            due: Duration::ZERO,
            first_sent: None,
            last_sent: Duration::ZERO,
            finished: Duration::ZERO,
            retries: 0,
            outcome: Outcome::Accepted {
                replayed,
                body: body.into(),
            },
        }
    }

    #[test]
    fn a_design_that_sells_wrongly_is_found() {
        let sold = |replayed| -> Vec<Record> {
            (0..CHECK_STOCK)
                .map(|n| record(n, replayed, n, n + 1))
                .collect()
        };
        let wrong =
            |first: &[Record], again: &[Record]| check(first, again).unwrap_err().to_string();
        check(&sold(false), &sold(true)).unwrap();
        assert!(wrong(&sold(false)[1..], &sold(true)).contains("149 of 150"));
        let mut first = sold(false);
        first[0] = record(0, false, 1, 1);
        assert!(wrong(&first, &sold(true)).contains("limit"));
        first[0] = record(0, false, 0, CHECK_STOCK + 1);
        assert!(wrong(&first, &sold(true)).contains("gaps"));
        assert!(wrong(&sold(false), &sold(false)).contains("retry"));
        let mut again = sold(true);
        again[0] = record(0, true, 9999, 1);
        assert!(wrong(&sold(false), &again).contains("retry"));
    }
}
