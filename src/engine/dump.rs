//! The state of a partition as the model says it, read with plain commands.
//!
//! For proofs: it shares no code with the scripts that wrote the state. It reads everything, so
//! it is not for a partition that sells.

use std::collections::BTreeMap;

use bytes::Bytes;
use fred::types::Value;
use uuid::Uuid;

use super::{
    Engine,
    error::EngineError,
    packed::{Unpack, read_policy},
};
use crate::domain::{
    id::{BuyerId, Epoch, Fingerprint, JournalId, OperationId, OrderId, RoundId},
    model::{Model, Round, Sale, Wish},
    money::{Currency, Money},
    round::{Counters, Intent, Terms, Window},
};

type Fields = BTreeMap<Bytes, Bytes>;

impl Engine {
    /// Everything that Redis knows of this partition and these rounds, journal included.
    ///
    /// # Errors
    /// [`EngineError::Protocol`] when something is missing, or is not what it should be.
    pub async fn dump(&self, rounds: &[RoundId]) -> Result<Model, EngineError> {
        let keys = self.shared.keys;
        let meta = self.hash(keys.meta()).await?;
        let epoch = Epoch(number(&meta, "epoch")?);
        let mut model = Model {
            epoch,
            pseq: number(&meta, "pseq")?,
            last_ms: number(&meta, "last_ms")?,
            ..Model::default()
        };
        for id in rounds {
            let round = self.dump_round(*id).await?;
            model.rounds.insert(*id, round);
            let sale = self.dump_sale(*id).await?;
            model.sales.insert(id.sale, sale);
        }
        let reader = self.journal_reader().await?;
        // What was trimmed is not there any more.
        let oldest = self.inspect().await?.journal_first.unwrap_or_default();
        let mut after = JournalId {
            epoch: oldest.epoch,
            pseq: oldest.pseq.saturating_sub(1),
        };
        loop {
            let read = reader.read(epoch, after, 1000).await;
            let entries = read
                .map_err(|error| EngineError::Protocol(error.to_string()))?
                .entries;
            let Some(last) = entries.last() else {
                return Ok(model);
            };
            after = last.id;
            for raw in entries {
                let entry = raw
                    .entry
                    .map_err(|error| EngineError::Protocol(error.to_string()))?;
                model.journal.push(entry);
            }
        }
    }

    async fn dump_round(&self, id: RoundId) -> Result<Round, EngineError> {
        let keys = self.shared.keys;
        let fields = self.hash(keys.round(id)).await?;
        let price = fields
            .get(b"price".as_slice())
            .filter(|price| price.len() == 11);
        let price = price.ok_or_else(|| missing("price"))?;
        let amount = price[..8].try_into().map_or(-1, i64::from_be_bytes);
        let currency = str::from_utf8(&price[8..]).unwrap_or_default();
        let terms = Terms {
            window: Window {
                opens_at_ms: number(&fields, "opens_ms")?,
                closes_at_ms: Some(number(&fields, "closes_ms")?).filter(|end| *end > 0),
            },
            per_buyer_limit: number(&fields, "buyer_limit")?,
            per_order_limit: number(&fields, "order_limit")?,
            unit_price: Currency::parse(currency)
                .and_then(|currency| Money::new(amount, currency))
                .map_err(|_| missing("price"))?,
            allocation: number(&fields, "provisioned")?,
            policy: read_policy(number(&fields, "policy")?, number(&fields, "hold_ms")?),
        };
        let word = fields.get(b"intent".as_slice());
        let intent = Intent::ALL
            .into_iter()
            .find(|intent| word.is_some_and(|word| word == intent.as_str().as_bytes()))
            .ok_or_else(|| missing("intent"))?;
        let counters = Counters {
            allocation: number(&fields, "allocation")?,
            remaining: number(&fields, "remaining")?,
            held: number(&fields, "held")?,
            sold: number(&fields, "sold")?,
            seq: number(&fields, "seq")?,
        };
        let buyers = self.dump_buyers(keys.buyers(id)).await?;
        let mut board = BTreeMap::new();
        let range = ["0", "-1", "WITHSCORES"].map(Bytes::from);
        let places = self.pairs("ZRANGE", keys.board(id), &range).await?;
        for (order, seq) in places {
            board.insert(score(&seq)?.cast_unsigned(), OrderId(uuid(&order)?));
        }
        let mut holds = BTreeMap::new();
        for (order, until) in self.pairs("ZRANGE", keys.holds(id), &range).await? {
            holds.insert(OrderId(uuid(&order)?), score(&until)?);
        }
        let mut line = BTreeMap::new();
        let wishes = self.hash(keys.wishes(id)).await?;
        for (buyer, seq) in self.pairs("ZRANGE", keys.line(id), &range).await? {
            let wish = wishes.get(&buyer).and_then(|bytes| {
                let (order, rest) = bytes.split_first_chunk::<16>()?;
                let (fingerprint, units) = rest.split_first_chunk::<8>()?;
                Some(Wish {
                    buyer: BuyerId(Uuid::from_slice(&buyer).ok()?),
                    order: OrderId(Uuid::from_bytes(*order)),
                    fingerprint: Fingerprint(*fingerprint),
                    units: u32::from_be_bytes(units.try_into().ok()?).into(),
                })
            });
            let seq: i64 = score(&seq)?;
            line.insert(seq.cast_unsigned(), wish.ok_or_else(|| missing("wish"))?);
        }
        let count = |name| number(&fields, name).unwrap_or(0_usize);
        if (buyers.len(), board.len())
            != (number(&fields, "n_buyers")?, number(&fields, "n_board")?)
            || (holds.len(), line.len(), wishes.len())
                != (count("n_holds"), count("n_line"), count("n_line"))
        {
            return Err(missing("buyers, places, holds or line"));
        }
        Ok(Round {
            terms,
            intent,
            counters,
            buyers,
            board,
            holds,
            line,
            grace_until_ms: number(&fields, "grace_ms").unwrap_or(0),
        })
    }

    async fn dump_sale(&self, id: RoundId) -> Result<Sale, EngineError> {
        let keys = self.shared.keys;
        let fields = self.hash(keys.sale(id.sale)).await?;
        let mut sale = Sale {
            round: number(&fields, "round")?,
            archived_rounds: number(&fields, "archived_rounds").unwrap_or(0),
            archived_orders: number(&fields, "n_archived").unwrap_or(0),
            buyers: self.dump_buyers(keys.sale_buyers(id.sale)).await?,
            ..Sale::default()
        };
        for (order, record) in self.hash(keys.orders(id.sale)).await? {
            let order = OrderId(uuid(&order)?);
            let record = Unpack(&record)
                .order(order)
                .ok_or_else(|| missing("record"))?;
            sale.orders.insert(order, record);
        }
        for (operation, packed) in self.hash(keys.ops(id.sale)).await? {
            let packed: [u8; 14] = packed
                .as_ref()
                .try_into()
                .map_err(|_| missing("operation"))?;
            let [a, b, c, d, e, f, g, h, seq @ ..] = packed;
            let [i, j, k, l, m, n] = seq;
            let seq = u64::from_be_bytes([0, 0, i, j, k, l, m, n]);
            let fingerprint = Fingerprint([a, b, c, d, e, f, g, h]);
            sale.operations
                .insert(OperationId(uuid(&operation)?), (fingerprint, seq));
        }
        if sale.buyers.len() != number(&fields, "n_buyers").unwrap_or(0) {
            return Err(missing("buyers of the sale"));
        }
        let orders = sale.orders.len() as u64 + sale.archived_orders;
        if (orders, sale.operations.len())
            != (number(&fields, "n_orders")?, number(&fields, "n_ops")?)
        {
            return Err(missing("orders or operations"));
        }
        Ok(sale)
    }

    async fn dump_buyers(&self, key: String) -> Result<BTreeMap<BuyerId, (u64, u64)>, EngineError> {
        let mut buyers = BTreeMap::new();
        for (buyer, packed) in self.hash(key).await? {
            let counts = Unpack(&packed).buyer().ok_or_else(|| missing("buyer"))?;
            buyers.insert(BuyerId(uuid(&buyer)?), counts);
        }
        Ok(buyers)
    }

    async fn hash(&self, key: String) -> Result<Fields, EngineError> {
        Ok(self.pairs("HGETALL", key, &[]).await?.into_iter().collect())
    }

    async fn pairs(
        &self,
        command: &'static str,
        key: String,
        arguments: &[Bytes],
    ) -> Result<Vec<(Bytes, Bytes)>, EngineError> {
        let arguments = [&[Bytes::from(key)], arguments].concat();
        let Value::Array(parts) = self.reads.command(command, arguments).await? else {
            return Err(missing(command));
        };
        let mut parts = parts.into_iter().filter_map(Value::into_bytes);
        let mut pairs = Vec::new();
        while let (Some(name), Some(value)) = (parts.next(), parts.next()) {
            pairs.push((name, value));
        }
        Ok(pairs)
    }
}

fn missing(what: &str) -> EngineError {
    EngineError::Protocol(format!("dump: {what} missing or damaged"))
}

fn number<T: std::str::FromStr>(fields: &Fields, name: &str) -> Result<T, EngineError> {
    let text = fields
        .get(name.as_bytes())
        .and_then(|value| str::from_utf8(value).ok());
    text.and_then(|text| text.parse().ok())
        .ok_or_else(|| missing(name))
}

fn score(text: &Bytes) -> Result<i64, EngineError> {
    let text = str::from_utf8(text).ok();
    text.and_then(|text| text.parse().ok())
        .ok_or_else(|| missing("place"))
}

fn uuid(bytes: &[u8]) -> Result<Uuid, EngineError> {
    Uuid::from_slice(bytes).map_err(|_| missing("id"))
}
