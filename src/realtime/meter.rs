//! What live stock counts.

use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge},
    registry::Registry,
};

/// Counters of live stock. No label names a sale.
#[derive(Clone, Debug, Default)]
pub struct RealtimeMeter {
    /// Open event streams.
    pub subscribers: Gauge,
    /// Sales that somebody watches on this node.
    pub watched: Gauge,
    /// Frames that were encoded, each once for all subscribers.
    pub frames: Counter,
    /// Reads of a watched round that failed.
    pub failed_samples: Counter,
}

impl RealtimeMeter {
    /// Open event streams.
    pub(super) fn subscribers(&self) -> usize {
        usize::try_from(self.subscribers.get()).unwrap_or(0)
    }

    /// Makes the counters visible.
    pub fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("realtime");
        registry.register(
            "subscribers",
            "Open event streams",
            self.subscribers.clone(),
        );
        registry.register(
            "watched_sales",
            "Sales that are watched",
            self.watched.clone(),
        );
        registry.register("frames", "Frames encoded", self.frames.clone());
        registry.register(
            "failed_samples",
            "Reads of a watched round that failed",
            self.failed_samples.clone(),
        );
    }
}
