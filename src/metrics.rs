//! Every metric there is: its name, its meaning, its labels. No label names a user or an order.

use std::sync::{Arc, atomic::AtomicU64};

use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};

/// Seconds, from a purchase that did not wait to a request that timed out.
const DURATION_BUCKETS: [f64; 14] = [
    0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0,
];

/// The metrics of this process.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Of the HTTP listeners.
    pub http: HttpMetrics,
    /// Of the hashing of passwords.
    pub passwords: PasswordMetrics,
    /// Of who may come in.
    pub identity: IdentityMetrics,
    /// Of the limits.
    pub limits: LimitMetrics,
    /// Of the engines.
    pub engine: EngineMetrics,
    /// Of the writers.
    pub writer: WriterMetrics,
    /// Of the auditor.
    pub audit: AuditMetrics,
    /// Of recovery.
    pub recovery: RecoveryMetrics,
    /// Of holds.
    pub holds: HoldMetrics,
    /// Of live stock.
    pub realtime: RealtimeMetrics,
    /// Of the catalogue.
    pub catalogue: CatalogueMetrics,
    /// Of the audit log.
    pub audit_log: AuditLogMetrics,
}

/// The way into the audit log.
#[derive(Clone, Debug, Default)]
pub struct AuditLogMetrics {
    /// Entries that found the queue full.
    pub dropped: Counter,
}

/// Requests by route and status.
#[derive(Clone, Debug)]
pub struct HttpMetrics {
    /// Requests answered.
    pub requests: Family<RequestLabels, Counter>,
    /// Seconds from a request's head to its answer's head.
    pub duration: Family<RouteLabels, Histogram>,
    /// Problems answered.
    pub refusals: Family<RefusalLabels, Counter>,
    /// Handlers that panicked.
    pub panics: Counter,
    /// Lines that the access log dropped because its writer was behind.
    pub access_log_dropped: Counter,
}

/// A kind of request and its answer.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RequestLabels {
    /// The route's template, or `unmatched`.
    pub route: Arc<str>,
    /// A standard method, or `OTHER`.
    pub method: &'static str,
    /// The status code.
    pub status: u16,
}

/// A kind of request.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RouteLabels {
    /// The route's template, or `unmatched`.
    pub route: Arc<str>,
    /// A standard method, or `OTHER`.
    pub method: &'static str,
}

/// A kind of problem.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RefusalLabels {
    /// The problem's code.
    pub code: &'static str,
}

/// How often the catalogue is not answered from memory.
#[derive(Clone, Debug, Default)]
pub struct CatalogueMetrics {
    /// Questions to PostgreSQL about products, images, what is open of them, and changes.
    pub queries: Counter,
    /// Pages that the cache Redis had.
    pub cached: Counter,
}

/// How busy the hashing of passwords is.
#[derive(Clone, Debug, Default)]
pub struct PasswordMetrics {
    /// Passwords that wait or are being hashed.
    pub queue: Gauge,
    /// Passwords refused because the queue was full.
    pub refused: Counter,
}

/// Who may come in, and who no longer.
#[derive(Clone, Debug, Default)]
pub struct IdentityMetrics {
    /// Ended sessions and disabled users that this node refuses.
    pub barred: Gauge,
    /// API keys that PostgreSQL was asked about.
    pub keys_asked: Counter,
    /// Questions about ended sessions and API keys that PostgreSQL did not answer.
    pub questions_failed: Counter,
}

impl IdentityMetrics {
    fn register(&self, registry: &mut Registry) {
        registry.register(
            "identity_barred",
            "Ended sessions and disabled users that this node refuses",
            self.barred.clone(),
        );
        registry.register(
            "identity_keys_asked",
            "API keys that PostgreSQL was asked about",
            self.keys_asked.clone(),
        );
        registry.register(
            "identity_questions_failed",
            "Questions about ended sessions and API keys that PostgreSQL did not answer",
            self.questions_failed.clone(),
        );
    }
}

/// Who did something too often.
#[derive(Clone, Debug, Default)]
pub struct LimitMetrics {
    /// Requests that were too many.
    pub refused: Family<RuleLabels, Counter>,
    /// 1 while this node counts alone, because the cache Redis does not answer.
    pub alone: Gauge,
    /// Connections that were closed at once, because their address had too many.
    pub connections: Counter,
}

/// A limit.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RuleLabels {
    /// The rule's name.
    pub rule: &'static str,
}

impl LimitMetrics {
    fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("limits");
        registry.register(
            "refused",
            "Requests that were too many",
            self.refused.clone(),
        );
        registry.register(
            "alone",
            "1 while limits are counted on each node alone, because the cache Redis does not answer",
            self.alone.clone(),
        );
        registry.register(
            "connections_refused",
            "Connections that were closed at once, because their address had too many",
            self.connections.clone(),
        );
    }
}

/// What the engines decide, all partitions together.
#[derive(Clone, Debug)]
pub struct EngineMetrics {
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
    /// Purchases that wait for a call.
    pub waiting: Family<PartitionLabels, Gauge>,
    /// 1 while nothing is sold because Redis may have lost something.
    pub fenced: Family<PartitionLabels, Gauge>,
    /// 1 while the stores can keep what sales with a durability promise.
    pub durable: Family<DurabilityLabels, Gauge>,
}

/// What a sale promises, on a partition.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct DurabilityLabels {
    /// The partition's number.
    pub partition: u16,
    /// The sale's word.
    pub durability: &'static str,
}

/// A partition.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PartitionLabels {
    /// Its number.
    pub partition: u16,
}

/// How far the writers are.
#[derive(Clone, Debug, Default)]
pub struct WriterMetrics {
    /// Journal entries that are not stored.
    pub lag_entries: Family<PartitionLabels, Gauge>,
    /// The age of the oldest of them.
    pub lag_seconds: Family<PartitionLabels, Gauge<f64, AtomicU64>>,
    /// The number of the last stored entry.
    pub position: Family<PartitionLabels, Gauge>,
    /// 1 while the writer cannot go on.
    pub halted: Family<PartitionLabels, Gauge>,
    /// Orders stored since the process started.
    pub orders: Family<PartitionLabels, Gauge>,
    /// Dead letters since the process started.
    pub dead_letters: Family<PartitionLabels, Gauge>,
}

impl Default for EngineMetrics {
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
            waiting: Family::default(),
            fenced: Family::default(),
            durable: Family::default(),
        }
    }
}

impl EngineMetrics {
    fn register(&self, registry: &mut Registry) {
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
        registry.register(
            "waiting",
            "Purchases that wait for a call",
            self.waiting.clone(),
        );
        registry.register(
            "fenced",
            "1 while nothing is sold because Redis may have lost something",
            self.fenced.clone(),
        );
        registry.register(
            "durable",
            "1 while the stores can keep what sales with this durability promise",
            self.durable.clone(),
        );
    }
}

impl WriterMetrics {
    fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("writer");
        registry.register(
            "lag_entries",
            "Journal entries that are not stored",
            self.lag_entries.clone(),
        );
        registry.register(
            "lag_seconds",
            "Age of the oldest journal entry that is not stored",
            self.lag_seconds.clone(),
        );
        registry.register(
            "position",
            "Number of the last stored entry",
            self.position.clone(),
        );
        registry.register(
            "halted",
            "1 while the writer cannot go on",
            self.halted.clone(),
        );
        registry.register(
            "orders",
            "Orders stored since the start",
            self.orders.clone(),
        );
        registry.register(
            "dead_letters",
            "Dead letters since the start",
            self.dead_letters.clone(),
        );
    }
}

/// What the auditor found.
#[derive(Clone, Debug, Default)]
pub struct AuditMetrics {
    /// Rounds of which a check fails at present.
    pub failing: Family<CheckLabels, Gauge>,
    /// Looks at a round, by what came of them.
    pub looks: Family<VerdictLabels, Counter>,
    /// Rounds that could not be looked at, because a store was away or fenced.
    pub errors: Counter,
    /// Seconds between Redis' clock and this node's.
    pub clock_skew: Family<PartitionLabels, Gauge<f64, AtomicU64>>,
}

/// A kind of check.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CheckLabels {
    /// The check's name.
    pub check: &'static str,
}

/// A kind of verdict.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct VerdictLabels {
    /// `pass`, `pending` or `fail`.
    pub verdict: &'static str,
}

impl AuditMetrics {
    fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("audit");
        registry.register(
            "failing_rounds",
            "Rounds of which a check fails at present",
            self.failing.clone(),
        );
        registry.register(
            "clock_skew_seconds",
            "Seconds between the clock of Redis and this node's",
            self.clock_skew.clone(),
        );
        registry.register(
            "looks",
            "Looks at a round, by what came of them",
            self.looks.clone(),
        );
        registry.register(
            "errors",
            "Rounds that could not be looked at, because a store was away or fenced",
            self.errors.clone(),
        );
    }
}

/// What was lost.
#[derive(Clone, Debug, Default)]
pub struct RecoveryMetrics {
    /// Incidents.
    pub incidents: Family<PartitionLabels, Gauge>,
    /// Lost acceptances that have not come back.
    pub lost_acceptances: Family<PartitionLabels, Gauge>,
}

impl RecoveryMetrics {
    fn register(&self, registry: &mut Registry) {
        registry.register(
            "incidents",
            "Losses of accepted orders that were noted, ever",
            self.incidents.clone(),
        );
        registry.register(
            "lost_acceptances",
            "Accepted orders that are listed as lost and have not come back",
            self.lost_acceptances.clone(),
        );
    }
}

/// What became of holds.
#[derive(Clone, Debug, Default)]
pub struct HoldMetrics {
    /// Holds that this node ended because their time was over.
    pub expired: Counter,
    /// Orders that it offered to buyers in line.
    pub offered: Counter,
}

impl HoldMetrics {
    fn register(&self, registry: &mut Registry) {
        registry.register(
            "holds_expired",
            "Holds that this node ended because their time was over",
            self.expired.clone(),
        );
        registry.register(
            "line_offered",
            "Orders that this node offered to buyers in line while it swept",
            self.offered.clone(),
        );
    }
}

impl Metrics {
    /// All metrics, at zero.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("stockade");
        let http = HttpMetrics {
            requests: Family::default(),
            duration: Family::new_with_constructor(|| Histogram::new(DURATION_BUCKETS)),
            refusals: Family::default(),
            panics: Counter::default(),
            access_log_dropped: Counter::default(),
        };
        registry.register("http_requests", "Requests answered", http.requests.clone());
        registry.register(
            "http_request_duration_seconds",
            "Seconds from a request's head to its answer's head",
            http.duration.clone(),
        );
        registry.register("http_refusals", "Problems answered", http.refusals.clone());
        registry.register("http_panics", "Handlers that panicked", http.panics.clone());
        registry.register(
            "access_log_dropped_lines",
            "Lines that the access log dropped because its writer was behind",
            http.access_log_dropped.clone(),
        );
        let passwords = PasswordMetrics::default();
        registry.register(
            "password_queue",
            "Passwords that wait or are being hashed",
            passwords.queue.clone(),
        );
        registry.register(
            "password_refused",
            "Passwords refused because the queue was full",
            passwords.refused.clone(),
        );
        let identity = IdentityMetrics::default();
        identity.register(&mut registry);
        let limits = LimitMetrics::default();
        limits.register(&mut registry);
        let engine = EngineMetrics::default();
        engine.register(&mut registry);
        let writer = WriterMetrics::default();
        writer.register(&mut registry);
        let audit = AuditMetrics::default();
        audit.register(&mut registry);
        let recovery = RecoveryMetrics::default();
        recovery.register(&mut registry);
        let holds = HoldMetrics::default();
        holds.register(&mut registry);
        let realtime = RealtimeMetrics::default();
        realtime.register(&mut registry);
        let audit_log = AuditLogMetrics::default();
        registry.register(
            "audit_log_dropped_entries",
            "Requests that the audit log does not have because PostgreSQL was away for too long",
            audit_log.dropped.clone(),
        );
        let catalogue = CatalogueMetrics::default();
        registry.register(
            "catalogue_queries",
            "Questions of the catalogue to PostgreSQL",
            catalogue.queries.clone(),
        );
        registry.register(
            "catalogue_cached",
            "Pages of products that the cache Redis had",
            catalogue.cached.clone(),
        );
        Self {
            registry,
            http,
            passwords,
            identity,
            limits,
            engine,
            writer,
            audit,
            recovery,
            holds,
            realtime,
            catalogue,
            audit_log,
        }
    }

    /// Everything as OpenMetrics text.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        // Writing into a string cannot fail; a metric that could not be encoded is left out.
        if let Err(error) = text::encode(&mut text, &self.registry) {
            tracing::error!(%error, "metrics could not be encoded");
        }
        text
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// What live stock costs.
#[derive(Clone, Debug, Default)]
pub struct RealtimeMetrics {
    /// Open event streams.
    pub subscribers: Gauge,
    /// Sales that somebody watches on this node.
    pub watched_sales: Gauge,
    /// Frames that were encoded, each once for all subscribers.
    pub frames: Counter,
    /// Reads of a watched round that failed.
    pub failed_samples: Counter,
    /// Open streams of a buyer's own events; also among `subscribers`.
    pub own_subscribers: Gauge,
    /// Reads of a journal for them.
    pub own_reads: Counter,
    /// Looks into PostgreSQL for them.
    pub own_lookups: Counter,
}

impl RealtimeMetrics {
    /// Open event streams.
    pub fn open_streams(&self) -> usize {
        usize::try_from(self.subscribers.get()).unwrap_or(0)
    }

    fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("realtime");
        registry.register(
            "subscribers",
            "Open event streams",
            self.subscribers.clone(),
        );
        registry.register(
            "watched_sales",
            "Sales that somebody watches",
            self.watched_sales.clone(),
        );
        registry.register("frames", "Frames encoded", self.frames.clone());
        registry.register(
            "failed_samples",
            "Reads of a watched round that failed",
            self.failed_samples.clone(),
        );
        registry.register(
            "own_subscribers",
            "Open streams of buyers' own events",
            self.own_subscribers.clone(),
        );
        registry.register(
            "own_reads",
            "Reads of a journal for buyers' own events",
            self.own_reads.clone(),
        );
        registry.register(
            "own_lookups",
            "Looks into PostgreSQL for buyers' own events",
            self.own_lookups.clone(),
        );
    }
}
