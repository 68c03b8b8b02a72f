//! How fast `PostgreSQL` takes the rows of orders when nobody looks at them: one binary `COPY` into a
//! table like `orders`, with its constraints and indexes.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use tokio_stream::StreamExt;

/// The scratch schema.
const SCHEMA: &str = "bench_floor";

/// What came of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Copied {
    pub(crate) rows: u64,
    pub(crate) time: Duration,
}

/// Rows of orders, as `PostgreSQL` itself writes them.
pub(crate) struct Rows {
    connection: PgConnection,
    binary: Vec<u8>,
    count: u64,
}

impl Rows {
    /// The latest orders of a database, in the order in which they were accepted.
    ///
    /// # Errors
    ///
    /// The database cannot be read, or there are no orders.
    pub(crate) async fn of(database: &str, most: u64) -> Result<Self> {
        let mut connection = PgConnection::connect(database).await?;
        let latest = format!("SELECT * FROM orders ORDER BY epoch DESC, pseq DESC LIMIT {most}");
        let select = format!("SELECT * FROM ({latest}) AS latest ORDER BY epoch, pseq, seq");
        let count: i64 = sqlx::query_scalar(AssertSqlSafe(format!(
            "SELECT count(*) FROM ({latest}) AS latest"
        )))
        .fetch_one(&mut connection)
        .await?;
        ensure!(count > 0, "there are no orders to copy");
        let copy = format!("COPY ({select}) TO STDOUT (FORMAT binary)");
        let mut out = connection.copy_out_raw(&copy).await?;
        let mut binary = Vec::new();
        while let Some(part) = out.next().await {
            binary.extend_from_slice(&part?);
        }
        drop(out);
        Ok(Self {
            connection,
            binary,
            count: count.cast_unsigned(),
        })
    }

    /// Copies them into a new table, in one transaction that is on disk at the end.
    ///
    /// # Errors
    ///
    /// The table cannot be made, or the rows do not fit.
    pub(crate) async fn copy(&mut self) -> Result<Copied> {
        let Self {
            connection,
            binary,
            count,
        } = self;
        let table = format!(
            "DROP SCHEMA IF EXISTS {SCHEMA} CASCADE; CREATE SCHEMA {SCHEMA};
             CREATE TABLE {SCHEMA}.orders (LIKE orders INCLUDING ALL)"
        );
        connection.execute(AssertSqlSafe(table)).await?;
        let begun = Instant::now();
        let into = format!("COPY {SCHEMA}.orders FROM STDIN (FORMAT binary)");
        let mut copy = connection.copy_in_raw(&into).await?;
        copy.send(&binary[..]).await?;
        let rows = copy.finish().await?;
        let time = begun.elapsed();
        ensure!(rows == *count, "{rows} rows were copied, not {count}");
        let dropped = format!("DROP SCHEMA {SCHEMA} CASCADE");
        connection.execute(AssertSqlSafe(dropped)).await?;
        Ok(Copied { rows, time })
    }
}
