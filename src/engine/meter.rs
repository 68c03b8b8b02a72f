//! What the engine counts.

use prometheus_client::{
    metrics::{
        counter::Counter,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

/// Counters of one engine. No label names a buyer, an order or a sale.
#[derive(Clone, Debug)]
pub struct EngineMeter {
    /// Calls of the purchase script.
    pub calls: Counter,
    /// Purchases per call.
    pub call_items: Histogram,
    /// Seconds from sending a call to its reply.
    pub call_seconds: Histogram,
    /// Purchases that were accepted.
    pub accepted: Counter,
    /// Purchases that replayed an earlier acceptance.
    pub replayed: Counter,
    /// Purchases that were refused by the script.
    pub refused: Counter,
    /// Purchases that were refused from memory.
    pub refused_from_memory: Counter,
    /// Purchases whose outcome is unknown.
    pub unknown: Counter,
}

impl Default for EngineMeter {
    fn default() -> Self {
        Self {
            calls: Counter::default(),
            call_items: Histogram::new(exponential_buckets(1.0, 2.0, 8)),
            call_seconds: Histogram::new(exponential_buckets(0.000_1, 2.0, 16)),
            accepted: Counter::default(),
            replayed: Counter::default(),
            refused: Counter::default(),
            refused_from_memory: Counter::default(),
            unknown: Counter::default(),
        }
    }
}

impl EngineMeter {
    /// Makes the counters visible.
    pub fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("engine");
        registry.register("calls", "Calls of the purchase script", self.calls.clone());
        registry.register("call_items", "Purchases per call", self.call_items.clone());
        registry.register(
            "call_seconds",
            "Seconds from call to reply",
            self.call_seconds.clone(),
        );
        registry.register("accepted", "Purchases accepted", self.accepted.clone());
        registry.register("replayed", "Purchases replayed", self.replayed.clone());
        registry.register(
            "refused",
            "Purchases refused by the script",
            self.refused.clone(),
        );
        registry.register(
            "refused_from_memory",
            "Purchases refused from memory",
            self.refused_from_memory.clone(),
        );
        registry.register(
            "unknown",
            "Purchases of unknown outcome",
            self.unknown.clone(),
        );
    }
}
