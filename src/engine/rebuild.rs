//! Loading a partition anew, while nobody is let in: `rebuild.lua`, `load.lua`. Only recovery uses
//! these.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::{
    Engine, Shared,
    epoch::{Inspection, InstallError},
    error::EngineError,
    journal::raw_entry,
    packed,
    reply::Reply,
};
use crate::domain::{
    id::{BuyerId, Epoch, JournalId, OrderId, RoundId, SaleNumber},
    journal::Entry,
    model::{Round, Sale, Wish},
};

/// Members of a key that one call writes: half a millisecond of Redis.
const CHUNK: usize = 500;

/// Entries of the journal that one call reads.
const PAGE: usize = 1_000;

/// One sale as it must be in Redis.
#[derive(Debug)]
pub struct SaleImage<'a> {
    /// Which.
    pub number: SaleNumber,
    /// What its rounds share.
    pub sale: &'a Sale,
    /// Its rounds, each with the last entry that touched it.
    pub rounds: BTreeMap<RoundId, (&'a Round, JournalId)>,
}

impl Engine {
    /// The journal after `after`, to its end, read without the fence.
    ///
    /// # Errors
    /// [`EngineError::Protocol`] when an entry cannot be read or is not the next one; nothing is
    /// ever changed.
    pub async fn tail(&self, after: JournalId) -> Result<Vec<Entry>, EngineError> {
        let mut entries: Vec<Entry> = Vec::new();
        loop {
            let last = entries.last().map_or(after, |entry| entry.id);
            let arguments = vec![
                Bytes::from(self.shared.keys.journal()),
                Bytes::from(format!("({last}")),
                Bytes::from_static(b"+"),
                Bytes::from_static(b"COUNT"),
                Bytes::from(PAGE.to_string()),
            ];
            let page = self.operations.command("XRANGE", arguments).await?;
            let page = page.into_array();
            if page.is_empty() {
                return Ok(entries);
            }
            for value in page {
                let damaged = |what: String| EngineError::Protocol(format!("journal: {what}"));
                let raw = raw_entry(value).ok_or_else(|| damaged("not an entry".to_owned()))?;
                let entry = raw.entry.map_err(|error| damaged(error.to_string()))?;
                let last = entries.last().map_or(after, |entry| entry.id);
                if entry.id.pseq != last.pseq + 1 {
                    return Err(damaged(format!("{} follows {last}", entry.id)));
                }
                entries.push(entry);
            }
        }
    }

    /// Begins to load the partition anew in `epoch`, if it is still as it was inspected. Nobody is
    /// let in until that epoch is installed.
    ///
    /// `end` is the number of the last entry that survives; the journal stays only if it ends
    /// there.
    ///
    /// # Errors
    /// [`InstallError`].
    pub async fn begin_rebuild(
        &self,
        epoch: Epoch,
        inspection: &Inspection,
        end: u64,
        keep_journal: bool,
    ) -> Result<(), InstallError> {
        let Shared { keys, scripts, .. } = &*self.shared;
        let names = vec![keys.meta(), keys.journal()];
        let arguments = vec![
            Bytes::from(epoch.0.to_string()),
            Bytes::from(inspection.raw_epoch().to_owned()),
            Bytes::from(inspection.incarnation().to_owned()),
            Bytes::from(end.to_string()),
            Bytes::from_static(if keep_journal { b"keep" } else { b"drop" }),
        ];
        let reply = self
            .operations
            .call(&scripts.rebuild, names, arguments)
            .await?;
        done(Reply::new("rebuild", reply))
    }

    /// Loads a sale with all its rounds, in place of whatever is there.
    ///
    /// # Errors
    /// [`InstallError`]; what is loaded by then is of no use, and nobody is let in.
    pub async fn load(&self, epoch: Epoch, image: &SaleImage<'_>) -> Result<(), InstallError> {
        let keys = self.shared.keys;
        let (number, sale) = (image.number, image.sale);
        let raw = |id: &[u8; 16]| Bytes::copy_from_slice(id);
        let orders = sale.orders.values();
        let orders = orders.map(|order| [raw(order.id.0.as_bytes()), packed::record(order).into()]);
        self.load_all(epoch, keys.orders(number), "HSET", orders)
            .await?;
        let ops = sale.operations.iter().map(|(id, (fingerprint, seq))| {
            let packed = packed::operation(*fingerprint, *seq);
            [raw(id.0.as_bytes()), packed.into()]
        });
        self.load_all(epoch, keys.ops(number), "HSET", ops).await?;
        self.load_buyers(epoch, keys.sale_buyers(number), &sale.buyers)
            .await?;
        for (id, (round, entry)) in &image.rounds {
            self.load_round(epoch, *id, round, *entry).await?;
        }
        let fields = vec![
            (
                "n_orders",
                (sale.orders.len() as u64 + sale.archived_orders).to_string(),
            ),
            ("n_archived", sale.archived_orders.to_string()),
            ("archived_rounds", sale.archived_rounds.to_string()),
            ("n_ops", sale.operations.len().to_string()),
            ("n_buyers", sale.buyers.len().to_string()),
            ("round", sale.round.to_string()),
        ];
        let key = keys.sale(number);
        self.load_one(epoch, key.clone(), "UNLINK", vec![]).await?;
        self.load_one(epoch, key, "HSET", hash(fields)).await
    }

    async fn load_round(
        &self,
        epoch: Epoch,
        id: RoundId,
        round: &Round,
        entry: JournalId,
    ) -> Result<(), InstallError> {
        let keys = self.shared.keys;
        self.load_buyers(epoch, keys.buyers(id), &round.buyers)
            .await?;
        let raw = |order: &OrderId| Bytes::copy_from_slice(order.0.as_bytes());
        let places = round.board.iter();
        let places = places.map(|(seq, order)| [seq.to_string().into(), raw(order)]);
        self.load_all(epoch, keys.board(id), "ZADD", places).await?;
        let holds = round.holds.iter();
        let holds = holds.map(|(order, until)| [until.to_string().into(), raw(order)]);
        self.load_all(epoch, keys.holds(id), "ZADD", holds).await?;
        let buyer = |wish: &Wish| Bytes::copy_from_slice(wish.buyer.0.as_bytes());
        let line = round.line.iter();
        let line = line.map(|(seq, wish)| [seq.to_string().into(), buyer(wish)]);
        self.load_all(epoch, keys.line(id), "ZADD", line).await?;
        let wishes = round.line.values();
        let wishes = wishes.map(|wish| [buyer(wish), packed::wish(wish).into()]);
        self.load_all(epoch, keys.wishes(id), "HSET", wishes)
            .await?;

        let (terms, counters) = (round.terms, round.counters);
        let mut fields = hash(vec![
            ("sale", id.sale.0.to_string()),
            ("round", id.round.to_string()),
            ("opens_ms", terms.window.opens_at_ms.to_string()),
            (
                "closes_ms",
                terms.window.closes_at_ms.unwrap_or(0).to_string(),
            ),
            ("buyer_limit", terms.per_buyer_limit.to_string()),
            ("order_limit", terms.per_order_limit.to_string()),
            ("provisioned", terms.allocation.to_string()),
            ("intent", round.intent.as_str().to_owned()),
            ("allocation", counters.allocation.to_string()),
            ("remaining", counters.remaining.to_string()),
            ("held", counters.held.to_string()),
            ("sold", counters.sold.to_string()),
            ("seq", counters.seq.to_string()),
            ("n_buyers", round.buyers.len().to_string()),
            ("n_board", round.board.len().to_string()),
            ("hold_ms", terms.policy.hold_ms.unwrap_or(0).to_string()),
            ("policy", packed::policy(&terms.policy).to_string()),
            ("n_holds", round.holds.len().to_string()),
            ("n_line", round.line.len().to_string()),
            ("entry", entry.to_string()),
        ]);
        if round.grace_until_ms > 0 {
            fields.extend(hash(vec![("grace_ms", round.grace_until_ms.to_string())]));
        }
        fields.push(Bytes::from_static(b"price"));
        fields.push(Bytes::copy_from_slice(&packed::price(terms.unit_price)));
        let key = keys.round(id);
        self.load_one(epoch, key.clone(), "UNLINK", vec![]).await?;
        self.load_one(epoch, key, "HSET", fields).await
    }

    async fn load_buyers(
        &self,
        epoch: Epoch,
        key: String,
        buyers: &BTreeMap<BuyerId, (u64, u64)>,
    ) -> Result<(), InstallError> {
        let buyers = buyers.iter().map(|(buyer, (units, acceptances))| {
            let packed = packed::buyer(*units, *acceptances);
            [Bytes::copy_from_slice(buyer.0.as_bytes()), packed.into()]
        });
        self.load_all(epoch, key, "HSET", buyers).await
    }

    /// Fills a key with pairs, some at a time, in place of whatever is there.
    async fn load_all(
        &self,
        epoch: Epoch,
        key: String,
        command: &'static str,
        pairs: impl Iterator<Item = [Bytes; 2]>,
    ) -> Result<(), InstallError> {
        self.load_one(epoch, key.clone(), "UNLINK", vec![]).await?;
        let mut some = Vec::with_capacity(2 * CHUNK);
        for pair in pairs {
            some.extend(pair);
            if some.len() == 2 * CHUNK {
                let full = std::mem::take(&mut some);
                self.load_one(epoch, key.clone(), command, full).await?;
            }
        }
        if some.is_empty() {
            return Ok(());
        }
        self.load_one(epoch, key, command, some).await
    }

    async fn load_one(
        &self,
        epoch: Epoch,
        key: String,
        command: &'static str,
        arguments: Vec<Bytes>,
    ) -> Result<(), InstallError> {
        let Shared { keys, scripts, .. } = &*self.shared;
        let mut all = vec![
            Bytes::from(epoch.0.to_string()),
            Bytes::from_static(command.as_bytes()),
        ];
        all.extend(arguments);
        let names = vec![keys.meta(), key];
        let reply = self.operations.call(&scripts.load, names, all).await?;
        done(Reply::new("load", reply))
    }
}

fn hash(fields: Vec<(&'static str, String)>) -> Vec<Bytes> {
    fields
        .into_iter()
        .flat_map(|(name, value)| [Bytes::from_static(name.as_bytes()), value.into()])
        .collect()
}

fn done(mut reply: Reply) -> Result<(), InstallError> {
    match reply.text()?.as_str() {
        "ok" => Ok(()),
        "changed" => Err(InstallError::Changed),
        word => Err(reply.unexpected(word).into()),
    }
}
