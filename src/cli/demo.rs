//! `stockade serve --demo`: a few products and a sale that opens in seconds.

use stockade::clock;
use stockade::domain::hurdles::Hurdles;
use stockade::domain::id::{Fingerprint, OperationId, Partition, ProductId, SaleId};
use stockade::domain::money::{Currency, Money};
use stockade::domain::order::Mode;
use stockade::domain::round::{Policy, Terms, Window};
use stockade::sales::Shop;
use stockade::store::products::{Added, Content, Products};
use stockade::store::sales::NewSale;
use uuid::Uuid;

/// Names, descriptions and prices in cents.
const PRODUCTS: [(&str, &str, i64); 6] = [
    (
        "Aurora Sneaker",
        "Limited run, numbered, in the colours of a polar night.",
        14_900,
    ),
    ("Lighthouse Lamp", "A lamp that turns once a minute.", 8_900),
    (
        "Field Notebook, set of 3",
        "Waterproof paper, stitched.",
        2_400,
    ),
    ("Copper Kettle", "Hammered by hand, 1.2 litres.", 11_500),
    (
        "Orbit Headphones",
        "Over-ear, forty hours on a charge.",
        19_900,
    ),
    (
        "Pocket Synthesizer",
        "Sixteen steps, three voices, two batteries.",
        6_900,
    ),
];

/// Units of the demonstration's sale, and how many one buyer gets.
const UNITS: u64 = 500;
const LIMIT: u64 = 2;
/// From the start of the server to the opening of the sale.
const OPENS_IN_MS: i64 = 10_000;

/// The user that made what nobody made.
const NOBODY: Uuid = Uuid::nil();

/// Adds what is not there yet, and a fresh sale of the first product.
pub(super) async fn seed(shop: &Shop, products: &Products) -> anyhow::Result<()> {
    let currency = Currency::parse("EUR")?;
    let mut first = None;
    for (name, description, amount) in PRODUCTS {
        let id = ProductId(OperationId::derive("demo", NOBODY, name).0);
        let price = Money::new(amount, currency)?;
        let content = Content {
            name: name.to_owned(),
            description: description.to_owned(),
            sku: None,
            price,
        };
        match products.add(id, &content, true, clock::now()).await? {
            Added::New(product) | Added::Replayed(product) => {
                first.get_or_insert(product);
            }
            // Somebody has given it another price since; that stays.
            Added::Mismatch | Added::SkuTaken => {}
        }
    }
    let Some(product) = first else { return Ok(()) };
    let opens_at_ms = clock::now_ms() + OPENS_IN_MS;
    let terms = Terms {
        window: Window {
            opens_at_ms,
            closes_at_ms: None,
        },
        per_buyer_limit: LIMIT,
        per_order_limit: LIMIT,
        unit_price: product.content.price,
        allocation: UNITS,
        policy: Policy::default(),
    };
    let id = SaleId(clock::new_id());
    // Partitions are verified within moments of the start.
    shop.engines.verified().await;
    shop.create(NewSale {
        id,
        fingerprint: Fingerprint::of(&[id.0.as_bytes()]),
        partition: Partition(0),
        product: product.id,
        name: format!("{} drop", product.content.name),
        small_print: None,
        durability: Mode::Default,
        payment: None,
        refund_returns_units: true,
        hurdles: Hurdles::default(),
        terms,
        schedule: None,
        created_by: NOBODY,
    })
    .await?;
    tracing::info!(sale = %id, units = UNITS, opens_in_ms = OPENS_IN_MS, "demonstration sale");
    Ok(())
}
