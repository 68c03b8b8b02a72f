//! Which sales of a product may be open, from memory: a crowd that looks at products costs
//! PostgreSQL a question a second. Whether they are open, and what is left, only Redis says.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use chrono::{DateTime, Utc};
use tokio::sync::Mutex as Turn;

use crate::{
    clock,
    domain::id::ProductId,
    metrics::CatalogueMetrics,
    store::{StoreError, sales::SaleFacts, sales::Sales},
};

/// How long an answer holds: a sale that another node makes shows up so late at most.
const FRESH: Duration = Duration::from_secs(1);

/// Products in memory.
const PRODUCTS_MAX: usize = 16_384;

/// The sales of a product that may be open, newest first.
type Candidates = Arc<[Arc<SaleFacts>]>;

/// The sales of products. Cheap to clone.
#[derive(Clone, Debug)]
pub struct OpenSales {
    sales: Sales,
    known: Arc<Mutex<HashMap<ProductId, (Instant, Candidates)>>>,
    /// One asks, the others wait for what it learns.
    turn: Arc<Turn<()>>,
    metrics: CatalogueMetrics,
}

impl OpenSales {
    /// One that knows nothing yet.
    pub fn new(sales: Sales, metrics: CatalogueMetrics) -> Self {
        Self {
            sales,
            known: Arc::default(),
            turn: Arc::default(),
            metrics,
        }
    }

    /// The newest sale of each of these products that is open now, by its window.
    pub(super) async fn of(
        &self,
        products: &[ProductId],
    ) -> Result<Vec<Arc<SaleFacts>>, StoreError> {
        if !self.unknown(products).is_empty() {
            let _turn = self.turn.lock().await;
            let unknown = self.unknown(products);
            if !unknown.is_empty() {
                self.ask(unknown).await?;
            }
        }
        Ok(self.pick(products, clock::now()))
    }

    /// The same by what was known last, however long ago.
    pub(super) fn as_known(&self, products: &[ProductId]) -> Vec<Arc<SaleFacts>> {
        self.pick(products, clock::now())
    }

    /// A sale of this product is new: whoever asks from now on sees it.
    pub(super) fn forget(&self, product: ProductId) {
        self.known().remove(&product);
    }

    fn known(&self) -> std::sync::MutexGuard<'_, HashMap<ProductId, (Instant, Candidates)>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unknown(&self, products: &[ProductId]) -> Vec<ProductId> {
        let known = self.known();
        let fresh = |id: &&ProductId| {
            let answer = known.get(id);
            answer.is_some_and(|(asked_at, _)| asked_at.elapsed() < FRESH)
        };
        products.iter().filter(|id| !fresh(id)).copied().collect()
    }

    async fn ask(&self, products: Vec<ProductId>) -> Result<(), StoreError> {
        let asked_at = Instant::now();
        let now = clock::now();
        self.metrics.queries.inc();
        // With those that open while the answer holds.
        let sales = self.sales.open_of(products.clone(), now, now + 2 * FRESH);
        let mut found: HashMap<ProductId, Vec<Arc<SaleFacts>>> = HashMap::new();
        for sale in sales.await? {
            found.entry(sale.product).or_default().push(sale);
        }
        let mut known = self.known();
        if known.len() + products.len() > PRODUCTS_MAX {
            known.clear();
        }
        for product in products {
            let candidates = found.remove(&product).unwrap_or_default();
            known.insert(product, (asked_at, candidates.into()));
        }
        Ok(())
    }

    fn pick(&self, products: &[ProductId], now: DateTime<Utc>) -> Vec<Arc<SaleFacts>> {
        let now_ms = now.timestamp_millis();
        let known = self.known();
        let open = |sale: &Arc<SaleFacts>| {
            let sale = Arc::clone(sale).at(now_ms);
            let window = sale.terms.window;
            let open =
                window.opens_at_ms <= now_ms && window.closes_at_ms.is_none_or(|end| now_ms < end);
            open.then_some(sale)
        };
        let newest = |id| known.get(id)?.1.iter().find_map(open);
        products.iter().filter_map(newest).collect()
    }
}
