//! Selling from `PostgreSQL` alone: under the lock of the row with the stock, in a transaction of several
//! statements or in one call of a function.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{AssertSqlSafe, Executor, PgPool};
use uuid::Uuid;

use crate::Shop;
use crate::clock;
use crate::route::{Design, Order, Outcome, Purchase};

const TABLES: &str = include_str!("postgres.sql");

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) shop: Shop,
    /// A `PostgreSQL` that may be written to.
    #[arg(long, hide_env_values = true)]
    database_url: String,
    /// Connections: the row's lock lets one of them through at a time.
    #[arg(long, env = "BASELINE_CONNECTIONS", default_value_t = 8)]
    connections: u32,
}

/// A schema of its own, with the stock.
pub(crate) struct Stores {
    pub(crate) pool: PgPool,
    schema: &'static str,
}

impl Stores {
    /// Makes the schema, in place of one that an earlier run left.
    pub(crate) async fn create(
        url: &str,
        connections: u32,
        schema: &'static str,
        shop: &Shop,
    ) -> Result<Self> {
        let options: PgConnectOptions = url.parse().context("--database-url")?;
        let pool = PgPoolOptions::new()
            .min_connections(connections)
            .max_connections(connections)
            .connect_with(options.options([("search_path", schema)]))
            .await
            .context("PostgreSQL does not answer")?;
        let stores = Self { pool, schema };
        stores.drop().await?;
        let text = format!("CREATE SCHEMA {schema}; {TABLES}");
        stores.pool.execute(AssertSqlSafe(text)).await?;
        for (sale, stock) in shop.stock() {
            sqlx::query("INSERT INTO sales (id, remaining, buyer_limit) VALUES ($1, $2, $3)")
                .bind(sale)
                .bind(i32::try_from(stock)?)
                .bind(i32::try_from(shop.limit)?)
                .execute(&stores.pool)
                .await?;
        }
        Ok(stores)
    }

    /// Leaves nothing behind.
    pub(crate) async fn drop(&self) -> Result<()> {
        let text = format!("DROP SCHEMA IF EXISTS {} CASCADE", self.schema);
        self.pool.execute(AssertSqlSafe(text)).await?;
        Ok(())
    }
}

#[derive(sqlx::FromRow)]
struct Row {
    id: Uuid,
    quantity: i32,
    seq: i64,
    accepted_ms: i64,
}

impl TryFrom<Row> for Order {
    type Error = anyhow::Error;

    fn try_from(row: Row) -> Result<Self> {
        Ok(Self {
            id: row.id,
            quantity: row.quantity.try_into()?,
            seq: row.seq.try_into()?,
            accepted_ms: row.accepted_ms,
        })
    }
}

/// Two statements between BEGIN and COMMIT.
pub(crate) struct RowLocks {
    pool: PgPool,
}

const LOCK: &str = "SELECT remaining, buyer_limit, seq FROM sales WHERE id = $1 FOR UPDATE";

/// Everything else in one go, so that the lock is held for as few round trips as can be. The unique key
/// of `buyers` enforces the limit, that of `orders` the idempotency.
const SELL: &str = "WITH buyer AS (
        INSERT INTO buyers AS b VALUES ($2, $3, $5)
        ON CONFLICT (sale_id, buyer_id) DO UPDATE SET units = b.units + excluded.units
        WHERE b.units + excluded.units <= $6
        RETURNING 1),
    sale AS (
        UPDATE sales SET remaining = remaining - $5, seq = seq + 1
        WHERE id = $2 AND EXISTS (SELECT FROM buyer)
        RETURNING seq)
    INSERT INTO orders SELECT $1, $2, $3, $4, $5, seq, clock_timestamp() FROM sale
    ON CONFLICT DO NOTHING
    RETURNING id, quantity, seq, (extract(epoch FROM accepted_at) * 1000)::bigint AS accepted_ms";

const KNOWN: &str = "SELECT id, quantity, seq,
           (extract(epoch FROM accepted_at) * 1000)::bigint AS accepted_ms
    FROM orders WHERE sale_id = $1 AND buyer_id = $2 AND key = $3";

impl RowLocks {
    pub(crate) async fn start(args: &Args) -> Result<(Arc<Self>, Stores)> {
        let (url, schema) = (&args.database_url, "baseline_row_locks");
        let stores = Stores::create(url, args.connections, schema, &args.shop).await?;
        let pool = stores.pool.clone();
        Ok((Arc::new(Self { pool }), stores))
    }

    async fn known(&self, purchase: &Purchase) -> Result<Option<Order>> {
        let row: Option<Row> = sqlx::query_as(KNOWN)
            .bind(purchase.sale)
            .bind(purchase.buyer)
            .bind(&purchase.key)
            .fetch_optional(&self.pool)
            .await?;
        row.map(Order::try_from).transpose()
    }

    /// `Err` with the refusal, which holds unless the key has an order.
    async fn sell(&self, purchase: &Purchase) -> Result<Result<Order, &'static str>> {
        let quantity = i32::try_from(purchase.quantity)?;
        let mut transaction = self.pool.begin().await?;
        let sale: Option<(i32, i32, i64)> = sqlx::query_as(LOCK)
            .bind(purchase.sale)
            .fetch_optional(&mut *transaction)
            .await?;
        let refusal = match sale {
            None => "not_found",
            Some((_, limit, _)) if quantity > limit => "buyer_limit",
            Some((0, ..)) => "sold_out",
            Some((remaining, ..)) if remaining < quantity => "insufficient",
            Some((_, limit, _)) => {
                let row: Option<Row> = sqlx::query_as(SELL)
                    .bind(clock::new_id())
                    .bind(purchase.sale)
                    .bind(purchase.buyer)
                    .bind(&purchase.key)
                    .bind(quantity)
                    .bind(limit)
                    .fetch_optional(&mut *transaction)
                    .await?;
                if let Some(row) = row {
                    transaction.commit().await?;
                    return Ok(Ok(row.try_into()?));
                }
                "buyer_limit"
            }
        };
        transaction.rollback().await?;
        Ok(Err(refusal))
    }
}

impl Design for RowLocks {
    async fn purchase(&self, purchase: &Purchase) -> Result<Outcome> {
        // Almost nobody retries: whether the key has an order is asked when there would be none.
        match self.sell(purchase).await? {
            Ok(order) => Ok(Outcome::Accepted(order)),
            Err(refusal) => Ok(match self.known(purchase).await? {
                Some(order) => Outcome::Replayed(order),
                None => Outcome::Refused(refusal),
            }),
        }
    }
}

/// One statement, which is its own transaction.
pub(crate) struct StoredFunction {
    pool: PgPool,
}

#[derive(sqlx::FromRow)]
struct Decision {
    word: String,
    #[sqlx(flatten)]
    row: Row,
}

impl StoredFunction {
    pub(crate) async fn start(args: &Args) -> Result<(Arc<Self>, Stores)> {
        let (url, schema) = (&args.database_url, "baseline_stored_function");
        let stores = Stores::create(url, args.connections, schema, &args.shop).await?;
        let pool = stores.pool.clone();
        Ok((Arc::new(Self { pool }), stores))
    }
}

impl Design for StoredFunction {
    async fn purchase(&self, purchase: &Purchase) -> Result<Outcome> {
        let call = "SELECT word, id, quantity, seq,
                   (extract(epoch FROM accepted_at) * 1000)::bigint AS accepted_ms
            FROM purchase($1, $2, $3, $4, $5)";
        let Decision { word, row } = sqlx::query_as(call)
            .bind(purchase.sale)
            .bind(purchase.buyer)
            .bind(&purchase.key)
            .bind(i32::try_from(purchase.quantity)?)
            .bind(clock::new_id())
            .fetch_one(&self.pool)
            .await?;
        Ok(match word.as_str() {
            "accepted" => Outcome::Accepted(row.try_into()?),
            "replayed" => Outcome::Replayed(row.try_into()?),
            "not_found" => Outcome::Refused("not_found"),
            "buyer_limit" => Outcome::Refused("buyer_limit"),
            "sold_out" => Outcome::Refused("sold_out"),
            "insufficient" => Outcome::Refused("insufficient"),
            _ => bail!("the function said {word}"),
        })
    }
}
