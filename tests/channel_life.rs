//! One channel from the deposit to the settlement: payer's book, channel machine, store and escrow, without a network.

#![allow(clippy::unwrap_used)]

use tollway::escrow::{Escrow, EscrowChannel, Ledger, LedgerConfig, LocalLedger, Settlement};
use tollway::store::{ChannelRecord, ChannelStore, MemoryStore, apply};
use tollway_protocol::payment::channel::{
    ChannelParams, ChannelPhase, ChannelPolicy, CloseAnswer, Precheck, VerifiedClose, VerifiedVoucher,
};
use tollway_protocol::payment::ledger_messages::{Close, OpenChannel, Signed};
use tollway_protocol::payment::{
    Address, Amount, CloseVoucher, Hash, LedgerIdentity, PayerBook, PayerLimits, PaymentChannel, SecretKey, Verifier,
    Voucher, VoucherDomain,
};

const TOKEN: Address = Address([0x20; 20]);
const POLICY: ChannelPolicy = ChannelPolicy { minimum_delta: Amount::new(10), lease: Amount::new(40) };

fn key(seed: u8) -> SecretKey {
    SecretKey::from_bytes([seed; 32]).unwrap()
}

fn units(amount: u64) -> Amount {
    Amount::from(amount)
}

fn limits() -> PayerLimits {
    PayerLimits {
        budget: units(1_000),
        max_ahead: units(100),
        low_mark: None,
        minimum_delta: units(10),
        deposit_limit: units(1_000),
        top_up_step: units(100),
        in_flight_cap: units(200),
        loss_budget: units(200),
    }
}

/// The payee's side of one channel.
struct Payee {
    store: MemoryStore,
    escrow: LocalLedger,
    channel: PaymentChannel,
    domain: VoucherDomain,
    verifier: Verifier,
}

impl Payee {
    /// Takes over a channel that the escrow knows and the store does not.
    async fn open(escrow: LocalLedger, known: EscrowChannel) -> Self {
        let params = ChannelParams::new(&known.descriptor, known.deposit, known.settled, POLICY);
        let mut channel = PaymentChannel::open(params).unwrap();
        let (domain, verifier) = (known.descriptor.voucher_domain(), Verifier::new(known.descriptor.signer()));
        let store = MemoryStore::new();
        let record = ChannelRecord::new(known.descriptor, channel.snapshot());
        store.update(channel.channel_id(), None, record).await.unwrap();
        apply(&store, &channel.take_ownership(1).unwrap()).await.unwrap();
        Payee { store, escrow, channel, domain, verifier }
    }

    async fn accept(&mut self, voucher: &Voucher) -> Amount {
        if self.channel.precheck_voucher(voucher).unwrap() == Precheck::Again {
            return self.channel.accepted();
        }
        let verified = VerifiedVoucher::verify(voucher, &self.domain, &self.verifier).unwrap();
        let Some(plan) = self.channel.propose_voucher(&verified).unwrap() else { return self.channel.accepted() };
        apply(&self.store, plan.update()).await.unwrap();
        self.channel.commit_voucher(plan).unwrap()
    }

    /// `spent` is the session's count; what comes back is the session's new lease.
    async fn lease(&mut self, spent: Amount, wanted: Amount) -> Option<Amount> {
        self.channel.record_spent(spent).unwrap();
        let plan = self.channel.propose_lease(wanted).unwrap()?;
        apply(&self.store, plan.update()).await.unwrap();
        Some(self.channel.commit_lease(plan).unwrap().leased)
    }

    async fn close(&mut self, spent: Amount, voucher: &CloseVoucher) -> Settlement {
        let id = self.channel.channel_id();
        self.channel.record_spent(spent).unwrap();
        let surrender = self.channel.surrender_lease().unwrap();
        apply(&self.store, surrender.update()).await.unwrap();
        let _ = self.channel.commit_lease(surrender).unwrap();
        let verified = VerifiedClose::verify(id, voucher, &self.domain, &self.verifier).unwrap();
        let CloseAnswer::Taken { close, update } = self.channel.close(&verified).unwrap() else { panic!("disputed") };
        apply(&self.store, &update).await.unwrap();
        let order = Signed::sign(Close { channel_id: id, amount: close.amount }, &self.escrow.identity(), &key(2));
        let settlement = self.escrow.close(order, Some(close.signature)).await.unwrap();
        apply(&self.store, &self.channel.finalize(settlement.settled).unwrap()).await.unwrap();
        settlement
    }
}

/// Signs ahead as far as the book lets; the ceiling is durable before a voucher leaves.
fn sign_ahead(book: &mut PayerBook, payee: &Payee) -> Option<Voucher> {
    let amount = book.next_voucher()?;
    if let Some(ceiling) = book.next_ceiling(amount) {
        // A wallet writes the snapshot with this ceiling here.
        book.record_ceiling(ceiling);
    }
    book.record_signed(amount).unwrap();
    Some(Voucher::sign(&payee.domain, &key(1), payee.channel.channel_id(), amount).unwrap())
}

#[tokio::test]
async fn a_channel_is_paid_through_and_settled_at_what_was_received() {
    let identity = LedgerIdentity::of(&key(7));
    let escrow = LocalLedger::new(Ledger::new(identity, LedgerConfig { dev: true, ..LedgerConfig::default() }));
    let order = OpenChannel {
        payer: key(1).address(),
        payee: key(2).address(),
        token: TOKEN,
        salt: Hash([5; 32]),
        authorized_signer: Address::ZERO,
        deposit: units(1_000),
        nonce: 1,
        expiry: 0,
    };
    let known = escrow.open(Signed::sign(order, &identity, &key(1))).await.unwrap();
    let mut book = PayerBook::open(limits(), known.deposit);
    let mut payee = Payee::open(escrow.clone(), known).await;
    let id = payee.channel.channel_id();

    let (mut spent, mut leased) = (Amount::ZERO, Amount::ZERO);
    for _unit in 0..30 {
        while let Some(voucher) = sign_ahead(&mut book, &payee) {
            assert_eq!(payee.accept(&voucher).await, voucher.amount);
            assert_eq!(payee.accept(&voucher).await, voucher.amount);
        }
        let after = spent.checked_add(units(7)).unwrap();
        if after > leased {
            leased = payee.lease(spent, units(7)).await.unwrap();
        }
        assert!(after <= leased);
        spent = after;
        book.record_received(spent);
        let stored = payee.store.load(id).await.unwrap().unwrap().snapshot;
        assert!(stored.leased >= spent && stored.accepted >= stored.leased);
    }

    let amount = book.close_amount(Amount::ZERO);
    assert_eq!(amount, units(210));
    let close = CloseVoucher::sign(&payee.domain, &key(1), id, amount).unwrap();
    let settlement = payee.close(spent, &close).await;
    assert_eq!((settlement.settled, settlement.refunded), (amount, units(790)));
    assert_eq!(escrow.read(|ledger| ledger.balance(key(2).address(), TOKEN)), amount);
    let stored = payee.store.load(id).await.unwrap().unwrap();
    assert_eq!(stored.snapshot.phase, ChannelPhase::Finalized { close: Some(close) });
    assert_eq!((stored.snapshot.spent, stored.snapshot.leased, stored.snapshot.settled), (amount, amount, amount));
    payee.store.evict(id, stored.version).await.unwrap();
}
