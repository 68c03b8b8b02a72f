//! What a dead letter kept of a journal entry, however damaged.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stockade::{
    domain::id::{RoundId, SaleNumber},
    engine::read_payload,
};

fuzz_target!(|payload: &[u8]| {
    let round = RoundId {
        sale: SaleNumber(1),
        round: 1,
    };
    if let Some((orders, events)) = read_payload(round, payload) {
        assert!(orders.iter().all(|order| order.round == round));
        assert!(events.iter().all(|event| event.round == Some(round)));
    }
});
