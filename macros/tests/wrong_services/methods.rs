#[tollway_macros::service]
trait Wrong {
    fn waits_not(&self) -> u64;
    async fn no_self(value: u64) -> u64;
    async fn by_value(self) -> u64;
    async fn changes(&mut self) -> u64;
    async fn generic<T>(&self, value: T) -> T;
    async fn changes_argument(&self, value: &mut u64);
    async fn some_argument(&self, value: impl ToString);
    async fn pattern(&self, (one, two): (u64, u64));
    async fn borrowed(&self, name: &str) -> &str;
    async fn no_error(&self) -> std::io::Result<u64>;
    async fn opaque(&self) -> impl ToString;
    fn borrowed_items(&self) -> impl Stream<Item = &str>;
    async fn late_context(&self, value: u64, cx: &CallContext);
    #[idempotent(always)]
    async fn with_more(&self);
    #[idempotent]
    #[idempotent]
    async fn twice(&self);
}

fn main() {}
