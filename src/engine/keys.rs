//! Every key, with what it holds. All keys of a partition share its hash tag. None has a TTL.

use crate::domain::id::{Partition, RoundId, SaleNumber};

/// The names of a partition's keys.
#[derive(Clone, Copy, Debug)]
pub(super) struct Keys(pub(super) Partition);

impl Keys {
    /// Hash: epoch, incarnation, pseq, last instant. Written by the scripts; epoch by recovery alone.
    pub(super) fn meta(self) -> String {
        format!("{{{}}}:meta", self.0)
    }

    /// Stream: what PostgreSQL does not have yet, with the ids `<epoch>-<pseq>`.
    pub(super) fn journal(self) -> String {
        format!("{{{}}}:journal", self.0)
    }

    /// Hash: window, limits, price, intent, counters, counts of the keys beside it.
    pub(super) fn round(self, round: RoundId) -> String {
        format!("{{{}}}:round:{round}", self.0)
    }

    /// Hash: buyer → units and acceptances.
    pub(super) fn buyers(self, round: RoundId) -> String {
        format!("{{{}}}:round:{round}:buyers", self.0)
    }

    /// Sorted set: confirmed orders by the seq of their acceptance.
    pub(super) fn board(self, round: RoundId) -> String {
        format!("{{{}}}:round:{round}:board", self.0)
    }

    /// Sorted set: held orders by the instant at which they are held no more.
    pub(super) fn holds(self, round: RoundId) -> String {
        format!("{{{}}}:round:{round}:holds", self.0)
    }

    /// Sorted set: buyers that wait for units, by the seq with which they joined.
    pub(super) fn line(self, round: RoundId) -> String {
        format!("{{{}}}:round:{round}:line", self.0)
    }

    /// Hash: buyer in the line → what for.
    pub(super) fn wishes(self, round: RoundId) -> String {
        format!("{{{}}}:round:{round}:wishes", self.0)
    }

    /// Hash: current round, counts of the keys beside it.
    pub(super) fn sale(self, sale: SaleNumber) -> String {
        format!("{{{}}}:sale:{}", self.0, sale.0)
    }

    /// Hash: order → record; idempotency record and order book of all rounds.
    pub(super) fn orders(self, sale: SaleNumber) -> String {
        format!("{{{}}}:sale:{}:orders", self.0, sale.0)
    }

    /// Hash: buyer → units and acceptances, where a limit counts over all rounds of the sale.
    pub(super) fn sale_buyers(self, sale: SaleNumber) -> String {
        format!("{{{}}}:sale:{}:buyers", self.0, sale.0)
    }

    /// Hash: operation → what was asked and the seq it took.
    pub(super) fn ops(self, sale: SaleNumber) -> String {
        format!("{{{}}}:sale:{}:ops", self.0, sale.0)
    }

    /// The keys of every script that changes one round, in the order of `lua/shared/change.lua`.
    pub(super) fn change(self, round: RoundId) -> Vec<String> {
        vec![
            self.meta(),
            self.journal(),
            self.round(round),
            self.buyers(round),
            self.board(round),
            self.holds(round),
            self.line(round),
            self.wishes(round),
            self.sale(round.sale),
            self.orders(round.sale),
            self.sale_buyers(round.sale),
            self.ops(round.sale),
        ]
    }

    /// Channel: what is published here, replicas get after everything that was written before.
    /// Nobody listens.
    pub(super) fn replicas(self) -> String {
        format!("{{{}}}:replicas", self.0)
    }
}
