//! What single steps of a purchase cost, without a network: `make micro`.
#![expect(clippy::unwrap_used, reason = "a benchmark may fail")]

use std::hint::black_box;

use divan::{Bencher, counter::ItemsCount};
use stockade::{
    auth::{
        Role,
        token::{Identity, Secret, TokenKeys},
    },
    clock,
    config::Networks,
    domain::{
        allowance::Allowances,
        hurdles::{Candidate, Hurdles},
        id::{BuyerId, OrderId, SaleId, SaleNumber},
        proof::{ProofKey, Purpose, Subject},
    },
    engine::{
        Cache,
        bench::{Decisions, Echoing, JournalValue, pack, purchases},
    },
    metrics::LimitMetrics,
    throttle::{Class, Throttle, ThrottleSettings},
};
use uuid::Uuid;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Purchases in one call.
const BATCHES: [u32; 3] = [1, 16, 128];

fn main() {
    divan::main();
}

#[divan::bench]
fn token_check(bencher: Bencher) {
    let secret = Secret {
        id: "1",
        bytes: &[7; 32],
    };
    let keys = TokenKeys::new(&[secret], 600).unwrap();
    let identity = Identity {
        user: Uuid::from_u128(7),
        role: Role::Buyer,
        session: None,
        registered_at: None,
    };
    let token = keys
        .mint(identity, Uuid::from_u128(8), clock::now())
        .unwrap();
    bencher.bench(|| keys.verify(black_box(&token)).unwrap());
}

/// A purchase of somebody who was not there before, from an address that was.
#[divan::bench]
fn limits(bencher: Bencher) {
    let settings = ThrottleSettings {
        allowances: Allowances::default(),
        unlimited: Networks::default(),
        secret: vec![7; 32],
    };
    let (throttle, _) = Throttle::new(settings, Cache::default(), LimitMetrics::default()).unwrap();
    let mut buyer = 0;
    bencher.bench_local(|| {
        buyer += 1;
        let address = black_box([192, 0, 2, 1].into());
        let address = throttle.address(address, Class::Purchase, 1);
        (
            address,
            throttle.user(Uuid::from_u128(buyer), Class::Purchase, 1),
        )
    });
}

/// What a sale without and with a proof of work looks at before a purchase.
#[divan::bench(args = [false, true])]
fn hurdles(bencher: Bencher, proof: bool) {
    const NOW_MS: i64 = 1_795_770_000_000;
    let key = ProofKey::new(&[7; 32]).unwrap();
    let subject = Subject {
        sale: SaleId(Uuid::from_u128(1)),
        buyer: BuyerId(Uuid::from_u128(7)),
        purpose: Purpose::Order,
        key: "8ad2b2f4-54c4-4cfc-9dfd-9a5c0f3d6f0a",
    };
    // Every number solves it; looking costs the same.
    let (challenge, _) = key.challenge(&subject, 0, NOW_MS);
    let proofs = format!("{challenge}.7");
    let candidate = Candidate {
        proofs: Some(&proofs),
        ..subject.buyer.into()
    };
    let hurdles = Hurdles {
        proof_of_work_bits: proof.then_some(0),
        ..Hurdles::default()
    };
    bencher.bench(|| {
        let hurdles = black_box(&hurdles);
        let stopped = hurdles
            .any()
            .then(|| hurdles.stops(&candidate, &subject, &key, NOW_MS));
        assert_eq!(stopped.flatten(), None);
    });
}

#[divan::bench]
fn order_id() -> OrderId {
    let buyer = BuyerId(Uuid::from_u128(black_box(7)));
    OrderId::derive(SaleNumber(1), buyer, "8ad2b2f4-54c4-4cfc-9dfd-9a5c0f3d6f0a")
}

#[divan::bench(args = BATCHES)]
fn coalescer(bencher: Bencher, batch: u32) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let (coalescer, purchases) = (Echoing::default(), purchases(batch));
    bencher
        .counter(ItemsCount::new(batch))
        .bench_local(|| runtime.block_on(coalescer.submit(&purchases)));
}

#[divan::bench(args = BATCHES)]
fn pack_call(bencher: Bencher, batch: u32) {
    let purchases = purchases(batch);
    bencher
        .counter(ItemsCount::new(batch))
        .bench(|| pack(black_box(&purchases)));
}

#[divan::bench(args = BATCHES)]
fn read_reply(bencher: Bencher, batch: u32) {
    let purchases = purchases(batch);
    let decisions = Decisions::accepted(&purchases);
    bencher
        .counter(ItemsCount::new(batch))
        .with_inputs(|| decisions.clone())
        .bench_values(|decisions| decisions.read(&purchases).unwrap());
}

#[divan::bench(args = BATCHES)]
fn read_journal_entry(bencher: Bencher, batch: u32) {
    let entry = JournalValue::new(&purchases(batch));
    bencher
        .counter(ItemsCount::new(batch))
        .with_inputs(|| entry.clone())
        .bench_values(|entry| entry.read().unwrap());
}
