#[tollway_macros::service]
trait Wrong {
    #[price(calls = 100)]
    async fn misspelt(&self);
    #[price(call = 100, call = 200)]
    async fn twice(&self);
    #[price(call = 100)]
    #[price(item = 100)]
    async fn two(&self);
    #[price(max_item = 100)]
    async fn nothing(&self);
    #[price(call = "a hundred")]
    async fn words(&self);
    #[price(call = 340282366920938463463374607431768211456)]
    async fn too_much(&self);
    #[price(with = cost)]
    async fn no_maximum(&self);
    #[price(call = 10, max = 5)]
    async fn less_than_the_least(&self);
    #[price(max = 5, with = "cost")]
    async fn no_function(&self);
    #[price(max = 5, with = cost)]
    fn streams(&self) -> impl Stream<Item = u64>;
}

fn main() {}
