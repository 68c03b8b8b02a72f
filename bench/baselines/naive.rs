//! The design that a competent team builds first: Redis decides in one script call for each request,
//! the same script appends to a stream, and a worker moves the stream to `PostgreSQL`.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, Cmd, cmd};
use sqlx::PgPool;
use tokio::task::AbortHandle;
use uuid::Uuid;

use crate::Shop;
use crate::clock;
use crate::postgres::Stores;
use crate::route::{Design, Order, Outcome, Purchase};

const SCRIPT: &str = include_str!("naive.lua");
/// In front of every key.
const PREFIX: &str = "baseline:naive";
/// The worker's consumer group, and its name in it.
const GROUP: &str = "postgresql";
/// Rows of one transaction of the worker.
const BATCH: usize = 2000;
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// How long one read waits for entries, and the worker after a failure.
const WORKER_PAUSE: Duration = Duration::from_millis(200);

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) shop: Shop,
    /// A Redis that may be written to.
    #[arg(long, hide_env_values = true)]
    redis_url: String,
    /// A `PostgreSQL` that may be written to; without one nothing is drained.
    #[arg(long)]
    database_url: Option<String>,
    /// Sets `appendfsync` of that Redis, and sets it back at the end.
    #[arg(long, value_parser = ["always", "everysec"])]
    appendfsync: Option<String>,
    /// Connections that share the script calls; each pipelines what comes at the same time.
    #[arg(long, env = "BASELINE_CONNECTIONS", default_value_t = 2)]
    connections: usize,
}

pub(crate) struct Naive {
    connections: Vec<MultiplexedConnection>,
    next: AtomicUsize,
    sha: String,
    /// What `appendfsync` was, if it was changed.
    sync_before: Option<String>,
    /// With the task that drains.
    stores: Option<(Stores, AbortHandle)>,
}

fn key(sale: Uuid, what: &str) -> String {
    format!("{PREFIX}:{{{sale}}}:{what}")
}

fn journal() -> String {
    format!("{PREFIX}:journal")
}

impl Naive {
    pub(crate) async fn start(args: &Args) -> Result<Arc<Self>> {
        let client = Client::open(args.redis_url.as_str()).context("--redis-url")?;
        let config = AsyncConnectionConfig::new().set_response_timeout(Some(ANSWER_MAX));
        let mut connections = Vec::new();
        for _ in 0..args.connections.max(1) {
            let connection = client.get_multiplexed_async_connection_with_config(&config);
            connections.push(connection.await.context("Redis does not answer")?);
        }
        let mut redis = connections[0].clone();
        clear(&mut redis).await?;
        let mut sync_before = None;
        if let Some(sync) = &args.appendfsync {
            let mut get = cmd("CONFIG");
            get.arg("GET").arg("appendfsync");
            let (_, before): (String, String) = get.query_async(&mut redis).await?;
            set_sync(&mut redis, sync).await?;
            sync_before = Some(before);
        }
        let mut load = cmd("SCRIPT");
        load.arg("LOAD").arg(SCRIPT);
        let sha = load.query_async(&mut redis).await?;
        for (sale, stock) in &args.shop.sales {
            let mut put = cmd("HSET");
            put.arg(key(*sale, "sale"))
                .arg(&["remaining", &stock.to_string(), "opens_ms", "0"])
                .arg(&["limit", &args.shop.limit.to_string()]);
            put.exec_async(&mut redis).await?;
        }
        let mut group = cmd("XGROUP");
        let group = group.arg(&["CREATE", &journal(), GROUP, "0", "MKSTREAM"]);
        group.exec_async(&mut redis).await?;
        let stores = match &args.database_url {
            Some(url) => {
                let stores = Stores::create(url, 2, "baseline_naive", &args.shop).await?;
                // Its blocking reads would hold up whoever shares its connection.
                let config = AsyncConnectionConfig::new().set_response_timeout(None);
                let own = client.get_multiplexed_async_connection_with_config(&config);
                let worker = tokio::spawn(work(own.await?, stores.pool.clone()));
                Some((stores, worker.abort_handle()))
            }
            None => None,
        };
        Ok(Arc::new(Self {
            connections,
            next: AtomicUsize::new(0),
            sha,
            sync_before,
            stores,
        }))
    }

    /// Leaves nothing behind.
    pub(crate) async fn clear(&self) -> Result<()> {
        if let Some((_, worker)) = &self.stores {
            worker.abort();
        }
        let mut redis = self.connections[0].clone();
        clear(&mut redis).await?;
        if let Some(sync) = &self.sync_before {
            set_sync(&mut redis, sync).await?;
        }
        match &self.stores {
            Some((stores, _)) => stores.drop().await,
            None => Ok(()),
        }
    }
}

async fn set_sync(redis: &mut MultiplexedConnection, sync: &str) -> Result<()> {
    let mut set = cmd("CONFIG");
    set.arg("SET").arg("appendfsync").arg(sync);
    Ok(set.exec_async(redis).await?)
}

async fn clear(redis: &mut MultiplexedConnection) -> Result<()> {
    let mut all = cmd("KEYS");
    let keys: Vec<String> = all.arg(format!("{PREFIX}:*")).query_async(redis).await?;
    if !keys.is_empty() {
        cmd("UNLINK").arg(keys).exec_async(redis).await?;
    }
    Ok(())
}

impl Design for Naive {
    async fn purchase(&self, purchase: &Purchase) -> Result<Outcome> {
        let now_ms = clock::now_ms();
        let mut script = Cmd::new();
        script
            .arg("EVALSHA")
            .arg(&self.sha)
            .arg(4)
            .arg(key(purchase.sale, "sale"))
            .arg(key(purchase.sale, "buyers"))
            .arg(key(purchase.sale, "orders"))
            .arg(journal())
            .arg(purchase.buyer.to_string())
            .arg(&purchase.key)
            .arg(purchase.quantity)
            .arg(clock::new_id().to_string())
            .arg(now_ms)
            .arg(purchase.sale.to_string());
        let turn = self.next.fetch_add(1, Ordering::Relaxed) % self.connections.len();
        let mut redis = self.connections[turn].clone();
        let (word, order): (String, String) = script.query_async(&mut redis).await?;
        Ok(match word.as_str() {
            "accepted" => Outcome::Accepted(read(&order)?),
            "replayed" => Outcome::Replayed(read(&order)?),
            "not_found" => Outcome::Refused("not_found"),
            "not_open" => Outcome::Refused("not_open"),
            "buyer_limit" => Outcome::Refused("buyer_limit"),
            "sold_out" => Outcome::Refused("sold_out"),
            "insufficient" => Outcome::Refused("insufficient"),
            _ => bail!("the script said {word}"),
        })
    }
}

/// Reads an order as the script writes it.
fn read(order: &str) -> Result<Order> {
    let mut words = order.split(' ');
    let mut word = || words.next().context("an order has four words");
    Ok(Order {
        id: word()?.parse()?,
        quantity: word()?.parse()?,
        seq: word()?.parse()?,
        accepted_ms: word()?.parse()?,
    })
}

/// One entry of the stream.
type Entry = (String, Vec<(String, String)>);
/// What `XREADGROUP` answers: for each stream its entries.
type Read = Option<Vec<(String, Vec<Entry>)>>;

/// Moves the stream to `PostgreSQL`: a batch, a transaction, an acknowledgement. What was read and not
/// acknowledged comes again, and is there already.
async fn work(mut redis: MultiplexedConnection, pool: PgPool) {
    loop {
        if let Err(error) = drain(&mut redis, &pool).await {
            let _ = writeln!(io::stderr().lock(), "stockade-baseline: worker: {error:#}");
            tokio::time::sleep(WORKER_PAUSE).await;
        }
    }
}

async fn drain(redis: &mut MultiplexedConnection, pool: &PgPool) -> Result<()> {
    let stream = journal();
    let mut from = "0";
    loop {
        let mut next = cmd("XREADGROUP");
        next.arg(&["GROUP", GROUP, "worker", "COUNT"])
            .arg(BATCH)
            .arg("BLOCK")
            .arg(u64::try_from(WORKER_PAUSE.as_millis())?)
            .arg(&["STREAMS", &stream, from]);
        let read: Read = next.query_async(redis).await?;
        let entries: Vec<Entry> = read
            .into_iter()
            .flatten()
            .flat_map(|(_, entries)| entries)
            .collect();
        if entries.is_empty() {
            // What an earlier failure left is done.
            from = ">";
            continue;
        }
        store(pool, &entries).await?;
        let ids: Vec<&str> = entries.iter().map(|(id, _)| id.as_str()).collect();
        let mut done = redis::pipe();
        done.cmd("XACK").arg(&stream).arg(GROUP).arg(&ids).ignore();
        done.cmd("XDEL").arg(&stream).arg(&ids).ignore();
        done.exec_async(redis).await?;
    }
}

async fn store(pool: &PgPool, entries: &[Entry]) -> Result<()> {
    let (mut ids, mut sales, mut buyers) = (Vec::new(), Vec::new(), Vec::new());
    let mut keys = Vec::new();
    let (mut quantities, mut seqs, mut instants) = (Vec::new(), Vec::new(), Vec::new());
    for (_, fields) in entries {
        let field = |name| {
            let found = fields.iter().find(|(known, _)| known == name);
            found
                .map(|(_, value)| value.as_str())
                .context("a field is missing")
        };
        let order = read(field("order")?)?;
        ids.push(order.id);
        sales.push(field("sale")?.parse::<Uuid>()?);
        buyers.push(field("buyer")?.parse::<Uuid>()?);
        keys.push(field("key")?.to_owned());
        quantities.push(i32::try_from(order.quantity)?);
        seqs.push(i64::try_from(order.seq)?);
        instants.push(order.accepted_ms);
    }
    let insert = "INSERT INTO orders (id, sale_id, buyer_id, key, quantity, seq, accepted_at)
        SELECT id, sale_id, buyer_id, key, quantity, seq, to_timestamp(ms / 1000.0)
        FROM unnest($1::uuid[], $2::uuid[], $3::uuid[], $4::text[], $5::int[], $6::bigint[],
                    $7::bigint[])
             AS new (id, sale_id, buyer_id, key, quantity, seq, ms)
        ON CONFLICT DO NOTHING";
    sqlx::query(insert)
        .bind(ids)
        .bind(sales)
        .bind(buyers)
        .bind(keys)
        .bind(quantities)
        .bind(seqs)
        .bind(instants)
        .execute(pool)
        .await?;
    Ok(())
}
