//! Which sales of a product may be open, from memory. Whether they are open, and what is left, only
//! Redis says.

use std::{collections::HashMap, sync::Arc};

use super::remembered::{FRESH, Remembered};
use crate::{
    clock,
    domain::id::ProductId,
    metrics::CatalogueMetrics,
    store::{StoreError, sales::SaleFacts, sales::Sales},
};

/// The sales of products. Cheap to clone.
#[derive(Clone, Debug)]
pub struct OpenSales {
    sales: Sales,
    /// Those that may be open, newest first.
    known: Arc<Remembered<ProductId, Arc<[Arc<SaleFacts>]>>>,
    metrics: CatalogueMetrics,
}

impl OpenSales {
    /// One that knows nothing yet.
    pub fn new(sales: Sales, metrics: CatalogueMetrics) -> Self {
        Self {
            sales,
            known: Arc::default(),
            metrics,
        }
    }

    /// The newest sale of each of these products that is open now, by its window.
    pub(super) async fn of(
        &self,
        products: &[ProductId],
    ) -> Result<Vec<Arc<SaleFacts>>, StoreError> {
        let ask = async |products| {
            let now = clock::now();
            self.metrics.queries.inc();
            // With those that open while the answer holds.
            let sales = self.sales.open_of(products, now, now + 2 * FRESH).await?;
            let mut found: HashMap<ProductId, Vec<Arc<SaleFacts>>> = HashMap::new();
            for sale in sales {
                found.entry(sale.product).or_default().push(sale);
            }
            let found = found.into_iter().map(|(id, sales)| (id, sales.into()));
            Ok(found.collect())
        };
        self.known.learn(products, ask).await?;
        Ok(self.as_known(products))
    }

    /// The same by what was known last, however long ago.
    pub(super) fn as_known(&self, products: &[ProductId]) -> Vec<Arc<SaleFacts>> {
        let now_ms = clock::now_ms();
        let open = |sale: &Arc<SaleFacts>| {
            let sale = Arc::clone(sale).at(now_ms);
            let window = sale.terms.window;
            let open =
                window.opens_at_ms <= now_ms && window.closes_at_ms.is_none_or(|end| now_ms < end);
            open.then_some(sale)
        };
        let newest = |id: &ProductId| self.known.get(*id)?.iter().find_map(open);
        products.iter().filter_map(newest).collect()
    }

    /// A sale of this product is new: whoever asks from now on sees it.
    pub(super) fn forget(&self, product: ProductId) {
        self.known.forget(product);
    }
}
