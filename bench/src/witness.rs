//! The witness outside the server: counts the rows in PostgreSQL itself.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use chrono::{DateTime, Utc};
use sqlx::postgres::PgRow;
use sqlx::{Connection, FromRow, PgConnection};
use tokio::time::timeout;
use uuid::Uuid;

use crate::target::Backstage;

/// Time for the whole look.
const LOOK_MAX: Duration = Duration::from_mins(1);

/// An order as PostgreSQL has it.
#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow)]
pub(crate) struct Row {
    pub(crate) id: Uuid,
    pub(crate) buyer_id: Uuid,
    pub(crate) quantity: i64,
    pub(crate) seq: i64,
    pub(crate) status: String,
}

/// How a hold ended, as PostgreSQL has it.
#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow)]
pub(crate) struct End {
    pub(crate) order_id: Uuid,
    /// `confirm`, `cancel` or `expire`.
    pub(crate) kind: String,
    /// By the clock of the store that decides.
    pub(crate) at: DateTime<Utc>,
}

/// Looks again and again at what PostgreSQL has of some sales.
pub(crate) struct Watch {
    connection: PgConnection,
    sales: Vec<Uuid>,
}

impl Watch {
    /// None: the server's database is not known, or does not have the sales.
    pub(crate) async fn of(backstage: &Backstage, sales: &[Uuid]) -> Option<Self> {
        for database in backstage.databases() {
            if let Ok(Ok(connection)) = timeout(LOOK_MAX, PgConnection::connect(&database)).await {
                let sales = sales.to_vec();
                let mut watch = Self { connection, sales };
                if watch.sold().await.is_ok_and(|sold| sold.is_some()) {
                    return Some(watch);
                }
            }
        }
        None
    }

    /// Units that are stored as sold; none if there are no such sales.
    pub(crate) async fn sold(&mut self) -> Result<Option<u64>> {
        let sold: Option<i64> = sqlx::query_scalar(
            "SELECT sum(rounds.sold)::bigint FROM rounds JOIN sales ON sales.number = rounds.sale
             WHERE sales.id = ANY ($1)",
        )
        .bind(&self.sales)
        .fetch_one(&mut self.connection)
        .await?;
        Ok(sold.map(i64::cast_unsigned))
    }
}

/// The version of PostgreSQL, if it can be asked.
pub(crate) async fn version(backstage: &Backstage) -> Option<String> {
    let database = backstage.databases().into_iter().next()?;
    let mut connection = PgConnection::connect(&database).await.ok()?;
    let version = sqlx::query_scalar("SELECT current_setting('server_version')");
    version.fetch_one(&mut connection).await.ok()
}

/// Every order of a sale.
///
/// # Errors
///
/// No known database has the sale, or none can be read.
pub(crate) async fn orders(backstage: &Backstage, sale: Uuid) -> Result<Vec<Row>> {
    of_sale(
        backstage,
        sale,
        "SELECT orders.id, buyer_id, quantity, seq, orders.status
         FROM orders JOIN sales ON sales.number = orders.sale
         WHERE sales.id = $1 ORDER BY epoch, seq",
    )
    .await
}

/// Every end of a hold of a sale.
///
/// # Errors
///
/// No known database has the sale, or none can be read.
pub(crate) async fn ends(backstage: &Backstage, sale: Uuid) -> Result<Vec<End>> {
    of_sale(
        backstage,
        sale,
        "SELECT order_id, kind, at
         FROM round_events JOIN sales ON sales.number = round_events.sale
         WHERE sales.id = $1 AND kind IN ('confirm', 'cancel', 'expire') ORDER BY epoch, seq",
    )
    .await
}

/// What a query finds about a sale, in the database that has it.
async fn of_sale<T>(backstage: &Backstage, sale: Uuid, query: &'static str) -> Result<Vec<T>>
where
    T: for<'r> FromRow<'r, PgRow> + Send + Unpin,
{
    let mut trouble = None;
    for database in backstage.databases() {
        match timeout(LOOK_MAX, read(&database, sale, query)).await {
            Ok(Ok(Some(rows))) => return Ok(rows),
            Ok(Ok(None)) => trouble = trouble.or(Some("it does not have the sale".to_owned())),
            Ok(Err(error)) => trouble = Some(format!("{error:#}")),
            Err(_) => trouble = Some("it does not answer".to_owned()),
        }
    }
    match trouble {
        Some(trouble) => bail!("the server's database could not be read: {trouble}"),
        None => bail!(
            "the server's database is not known: set DATABASE_URL, or point --data-dir at the data \
             directory of an embedded server"
        ),
    }
}

/// The rows, or nothing if this is another server's database.
async fn read<T>(database: &str, sale: Uuid, query: &'static str) -> Result<Option<Vec<T>>>
where
    T: for<'r> FromRow<'r, PgRow> + Send + Unpin,
{
    let mut connection = PgConnection::connect(database)
        .await
        .context("not connected")?;
    let known: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM sales WHERE id = $1)")
        .bind(sale)
        .fetch_one(&mut connection)
        .await?;
    if !known {
        return Ok(None);
    }
    let rows = sqlx::query_as(query).bind(sale);
    let rows = rows.fetch_all(&mut connection).await?;
    connection.close().await?;
    Ok(Some(rows))
}
