//! What `purchase.lua` costs Redis by itself: the scripts that the server uses, on a Redis of their own
//! with `appendfsync always`, called from a tight loop.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use ::redis::{Client, Cmd, Connection, Value, cmd, from_redis_value};
use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

/// A script as the server joins it (`src/engine/script.rs`).
macro_rules! script {
    ($name:literal) => {
        concat!(
            "#!lua\n",
            include_str!("../../../lua/shared/partition.lua"),
            include_str!("../../../lua/shared/round.lua"),
            include_str!("../../../lua/shared/journal.lua"),
            include_str!(concat!("../../../lua/", $name, ".lua")),
        )
    };
}

/// Calls under way at once, as on a node.
const CALLS: usize = 4;

/// The rounds are open for as long as anybody measures, and no call is late.
const FAR_MS: u64 = 1 << 45;

/// How long Redis may take to start.
const START_MAX: Duration = Duration::from_secs(10);

/// What so many orders in calls of one size cost.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cost {
    pub(crate) orders: usize,
    pub(crate) time: Duration,
    /// Processor time of Redis, the writing of its file included.
    pub(crate) cpu: Duration,
}

/// A Redis of our own. It ends when this is dropped.
pub(crate) struct BareRedis {
    child: Child,
    connection: Connection,
    purchase: String,
    /// The number of the last sale.
    sales: u32,
    _dir: TempDir,
}

impl Drop for BareRedis {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl BareRedis {
    /// Starts it and begins an epoch.
    ///
    /// # Errors
    ///
    /// There is no Redis, or its scripts are not what this module knows.
    pub(crate) fn start() -> Result<Self> {
        let dir = TempDir::with_prefix("stockade-floor-")?;
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let program = ["redis-server", "valkey-server"];
        let start = |program: &&str| {
            Command::new(program)
                .args(["--bind", "127.0.0.1", "--port", &port.to_string()])
                .args([
                    "--save",
                    "",
                    "--appendonly",
                    "yes",
                    "--appendfsync",
                    "always",
                ])
                .arg("--dir")
                .arg(dir.path())
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .spawn()
                .ok()
        };
        let mut child = program.iter().find_map(start).context("no redis-server")?;
        let client = Client::open(format!("redis://127.0.0.1:{port}"))?;
        let begun = Instant::now();
        let connection = loop {
            match client.get_connection() {
                Ok(connection) => break connection,
                Err(error) if begun.elapsed() > START_MAX => {
                    let _ = child.kill();
                    return Err(error).context("Redis did not start");
                }
                Err(_) => sleep(Duration::from_millis(20)),
            }
        };
        let mut redis = Self {
            child,
            connection,
            purchase: String::new(),
            sales: 0,
            _dir: dir,
        };
        redis.begin()?;
        Ok(redis)
    }

    fn begin(&mut self) -> Result<()> {
        let info: String = cmd("INFO").arg("replication").query(&mut self.connection)?;
        let replid = info
            .lines()
            .find_map(|line| line.strip_prefix("master_replid:"))
            .context("no master_replid")?;
        let arguments = ["1", "", "0", replid].map(|text| text.as_bytes().to_vec());
        let keys = [key("meta"), key("journal")];
        self.run(script!("install"), &keys, &arguments, "ok")?;
        let mut load = cmd("SCRIPT");
        load.arg("LOAD").arg(script!("purchase"));
        self.purchase = load.query(&mut self.connection)?;
        Ok(())
    }

    fn run(
        &mut self,
        text: &str,
        keys: &[String],
        arguments: &[Vec<u8>],
        wanted: &str,
    ) -> Result<()> {
        let mut eval = cmd("EVAL");
        eval.arg(text).arg(keys.len()).arg(keys).arg(arguments);
        let reply: Vec<Value> = eval.query(&mut self.connection)?;
        let first: String = from_redis_value(reply.into_iter().next().context("no reply")?)?;
        ensure!(first == wanted, "a script answered {first}, not {wanted}");
        Ok(())
    }

    /// Makes a round with this many units, the first of a sale of its own.
    fn provision(&mut self, units: usize) -> Result<[String; 9]> {
        self.sales += 1;
        let sale = self.sales;
        let (round, sale_key) = (format!("round:{sale}.1"), format!("sale:{sale}"));
        let name = |owner: &str, part: &str| key(&format!("{owner}{part}"));
        let keys = [
            key("meta"),
            key("journal"),
            name(&round, ""),
            name(&round, ":buyers"),
            name(&round, ":board"),
            name(&round, ":holds"),
            name(&sale_key, ""),
            name(&sale_key, ":orders"),
            name(&sale_key, ":buyers"),
        ];
        // In the order of `lua/shared/change.lua`.
        let mut all = keys[..6].to_vec();
        all.extend([name(&round, ":line"), name(&round, ":wishes")]);
        all.extend_from_slice(&keys[6..]);
        all.push(name(&sale_key, ":ops"));
        let mut price = 1999_u64.to_be_bytes().to_vec();
        price.extend(b"EUR");
        let text = |text: String| text.into_bytes();
        let arguments = [
            caller(),
            text(sale.to_string()),
            text("1".to_owned()),
            text("0".to_owned()),
            text("0".to_owned()),
            text("1".to_owned()),
            text("1".to_owned()),
            price,
            // No holds, no policy.
            text("0".to_owned()),
            text("0".to_owned()),
            text(units.to_string()),
        ];
        self.run(script!("provision"), &all, &arguments, "ok")?;
        Ok(keys)
    }

    /// Sells `orders` units to as many buyers, `together` in each call.
    ///
    /// # Errors
    ///
    /// Something was not accepted.
    pub(crate) fn sell(&mut self, orders: usize, together: usize) -> Result<Cost> {
        let calls = orders.div_ceil(together);
        let orders = calls * together;
        let keys = self.provision(orders)?;
        let sale = self.sales;
        let packed: Vec<Vec<u8>> = (0..calls)
            .map(|call| {
                let items: Vec<u8> = (0..together)
                    .flat_map(|n| item(sale, call * together + n))
                    .collect();
                let mut purchase = Cmd::new();
                purchase.arg("EVALSHA").arg(&self.purchase).arg(keys.len());
                purchase.arg(&keys[..]).arg(caller()).arg("1").arg(items);
                purchase.get_packed_command()
            })
            .collect();
        let (cpu, begun) = (self.cpu()?, Instant::now());
        let mut accepted = 0;
        let mut sent = packed.iter();
        for call in sent.by_ref().take(CALLS) {
            self.connection.send_packed_command(call)?;
        }
        for _ in 0..calls {
            accepted += count_accepted(self.connection.recv_response()?)?;
            if let Some(call) = sent.next() {
                self.connection.send_packed_command(call)?;
            }
        }
        let time = begun.elapsed();
        let cpu = self.cpu()?.saturating_sub(cpu);
        ensure!(accepted == orders, "{accepted} of {orders} were accepted");
        Ok(Cost { orders, time, cpu })
    }

    /// Processor time that Redis has used.
    fn cpu(&mut self) -> Result<Duration> {
        let info: String = cmd("INFO").arg("cpu").query(&mut self.connection)?;
        let used = |name: &str| -> Result<f64> {
            let line = info.lines().find_map(|line| line.strip_prefix(name));
            Ok(line.context("no processor time in INFO")?.parse()?)
        };
        let seconds = used("used_cpu_sys:")? + used("used_cpu_user:")?;
        Ok(Duration::from_secs_f64(seconds))
    }
}

fn key(name: &str) -> String {
    format!("{{p0}}:{name}")
}

/// `CALLER` of `lua/shared/partition.lua`: epoch 1, and nothing to compare the clock with.
fn caller() -> Vec<u8> {
    let mut bytes = 1_u32.to_be_bytes().to_vec();
    for number in [0, 0, FAR_MS] {
        bytes.extend_from_slice(&number.to_be_bytes()[2..]);
    }
    bytes
}

/// `ITEM` of `lua/purchase.lua`: one unit for a buyer of its own. Ids look random, as hashes do.
fn item(sale: u32, n: usize) -> Vec<u8> {
    let mut bytes = vec![0];
    let (order, buyer) = (mix(2 * n as u64), mix(2 * n as u64 + 1));
    bytes.extend_from_slice(&sale.to_be_bytes());
    bytes.extend_from_slice(&order.to_be_bytes());
    bytes.extend_from_slice(&[0x80; 4]);
    // Fingerprint and buyer.
    bytes.extend_from_slice(&[7; 8]);
    bytes.extend_from_slice(&buyer.to_be_bytes());
    bytes.extend_from_slice(&order.to_be_bytes());
    bytes.extend_from_slice(&1_u32.to_be_bytes());
    // Survives a crash of Redis; no receipt is redeemed; nothing is archived.
    bytes.extend_from_slice(&[1, 0, 0, 0, 0, 0]);
    bytes
}

/// A permutation of the numbers (splitmix64), so that no id comes twice.
fn mix(n: u64) -> u64 {
    let n = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

/// How many orders a reply of `purchase.lua` accepts.
fn count_accepted(reply: Value) -> Result<usize> {
    let Value::Array(values) = reply else {
        bail!("purchase.lua answered {reply:?}");
    };
    let word = |value: &Value| matches!(value, Value::BulkString(word) if word == b"accepted");
    Ok(values.iter().filter(|value| word(value)).count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scripts_of_the_server_accept_what_the_floor_asks_of_them() {
        let mut redis = BareRedis::start().unwrap();
        for together in [1, 16, 128] {
            let cost = redis.sell(300, together).unwrap();
            assert_eq!(cost.orders % together, 0);
            assert!(cost.cpu > Duration::ZERO);
        }
    }

    #[test]
    fn no_id_comes_twice() {
        let mut ids: Vec<u64> = (0..10_000).map(mix).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), 10_000);
    }
}
