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
    id::{Epoch, JournalId, RoundId, SaleNumber},
    journal::Entry,
    model::{Round, Sale},
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
        let orders = keys.orders(number);
        self.load_one(epoch, orders.clone(), "UNLINK", vec![])
            .await?;
        let mut pairs = Vec::with_capacity(2 * CHUNK);
        for order in sale.orders.values() {
            pairs.push(Bytes::copy_from_slice(order.id.0.as_bytes()));
            pairs.push(Bytes::from(packed::record(order)));
            if pairs.len() == 2 * CHUNK {
                let full = std::mem::take(&mut pairs);
                self.load_one(epoch, orders.clone(), "HSET", full).await?;
            }
        }
        self.load_rest(epoch, orders, "HSET", pairs).await?;

        let ops = keys.ops(number);
        self.load_one(epoch, ops.clone(), "UNLINK", vec![]).await?;
        for (operation, (fingerprint, seq)) in &sale.operations {
            let packed = packed::operation(*fingerprint, *seq);
            let pair = vec![
                Bytes::copy_from_slice(operation.0.as_bytes()),
                packed.into(),
            ];
            self.load_one(epoch, ops.clone(), "HSET", pair).await?;
        }
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
        let buyers = keys.buyers(id);
        self.load_one(epoch, buyers.clone(), "UNLINK", vec![])
            .await?;
        let mut pairs = Vec::with_capacity(2 * CHUNK);
        for (buyer, (units, acceptances)) in &round.buyers {
            pairs.push(Bytes::copy_from_slice(buyer.0.as_bytes()));
            pairs.push(packed::buyer(*units, *acceptances).into());
            if pairs.len() == 2 * CHUNK {
                let full = std::mem::take(&mut pairs);
                self.load_one(epoch, buyers.clone(), "HSET", full).await?;
            }
        }
        self.load_rest(epoch, buyers, "HSET", pairs).await?;

        let board = keys.board(id);
        self.load_one(epoch, board.clone(), "UNLINK", vec![])
            .await?;
        let mut pairs = Vec::with_capacity(2 * CHUNK);
        for (seq, order) in &round.board {
            pairs.push(Bytes::from(seq.to_string()));
            pairs.push(Bytes::copy_from_slice(order.0.as_bytes()));
            if pairs.len() == 2 * CHUNK {
                let full = std::mem::take(&mut pairs);
                self.load_one(epoch, board.clone(), "ZADD", full).await?;
            }
        }
        self.load_rest(epoch, board, "ZADD", pairs).await?;

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

    async fn load_rest(
        &self,
        epoch: Epoch,
        key: String,
        command: &'static str,
        rest: Vec<Bytes>,
    ) -> Result<(), InstallError> {
        if rest.is_empty() {
            return Ok(());
        }
        self.load_one(epoch, key, command, rest).await
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
